//! Hands without a guest: they write down what they were told, and fail where the script says so.

use super::{Hands, Step};
use crate::GuestError;

/// A fake that carries steps out by noting them: `unplug vf0`, `undo unplug vf0`.
#[derive(Debug, Default)]
pub struct ScriptedHands {
    story: Vec<String>,
    failing: Vec<String>,
}

impl ScriptedHands {
    /// Fails at one line of the story.
    #[must_use]
    pub fn failing_at(line: &str) -> ScriptedHands {
        ScriptedHands { story: Vec::new(), failing: vec![line.to_owned()] }
    }

    /// Fails at one more line.
    #[must_use]
    pub fn and_at(mut self, line: &str) -> ScriptedHands {
        self.failing.push(line.to_owned());
        self
    }

    /// From now on everything works.
    pub fn fail_no_more(&mut self) {
        self.failing.clear();
    }

    /// What happened since the last call.
    pub fn take_story(&mut self) -> Vec<String> {
        std::mem::take(&mut self.story)
    }

    fn tell(&mut self, line: String) -> Result<(), GuestError> {
        let fails = self.failing.contains(&line).then(|| format!("the script fails at `{line}`"));
        self.story.push(line);
        fails.map_or(Ok(()), |sentence| Err(GuestError::misbehaved(sentence)))
    }
}

impl Hands for ScriptedHands {
    fn perform(&mut self, step: &Step) -> Result<(), GuestError> {
        self.tell(line(step))
    }

    fn undo(&mut self, step: &Step) -> Result<(), GuestError> {
        self.tell(format!("undo {}", line(step)))
    }
}

fn line(step: &Step) -> String {
    match step {
        Step::Remember(_) => "remember".into(),
        Step::PlugStandby(options) => format!("plug-standby {}", options.id()),
        Step::AwaitStandby(id) => format!("await-standby {id}"),
        Step::AwaitTraffic(id) => format!("await-traffic {id}"),
        Step::Unplug(options) => format!("unplug {}", options.id()),
    }
}
