//! The steps of a failover, and the ledger that undoes them.

use serde::{Deserialize, Serialize};

use super::DeviceOptions;
use crate::GuestError;

/// A virtio NIC that carries the guest's traffic while its primary is away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standby {
    /// The device's id.
    pub id: String,
    /// Its options, when it has to be plugged first; none when the guest has it.
    pub to_plug: Option<DeviceOptions>,
}

/// A device that cannot migrate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Primary {
    /// All that it takes to plug it again.
    pub options: DeviceOptions,
    /// Who takes over.
    pub standby: Standby,
}

/// One step of the way to a guest that can be moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Leaves word in the VMM of what is to be undone, for whoever comes after a sudden death. Undone: takes it away.
    Remember(Vec<Step>),
    /// Plugs a standby. Undone: unplugs it.
    PlugStandby(DeviceOptions),
    /// Waits until the guest's driver has taken the standby.
    AwaitStandby(String),
    /// Asks the guest to give the primary up and waits for it. Undone: plugs it again.
    Unplug(DeviceOptions),
    /// Waits until the standby sends; a guest that sends nothing is not waited for long.
    AwaitTraffic(String),
}

impl Step {
    /// Whether there is anything to undo.
    #[must_use]
    pub fn leaves_a_trace(&self) -> bool {
        match self {
            Step::Remember(_) | Step::PlugStandby(_) | Step::Unplug(_) => true,
            Step::AwaitStandby(_) | Step::AwaitTraffic(_) => false,
        }
    }

    /// Whether steps that could not be undone need this one to stay.
    fn is_needed_by(&self, kept: &[Step]) -> bool {
        match self {
            Step::Remember(_) => !kept.is_empty(),
            Step::PlugStandby(_) => kept.iter().any(|step| matches!(step, Step::Unplug(_))),
            Step::AwaitStandby(_) | Step::AwaitTraffic(_) | Step::Unplug(_) => false,
        }
    }
}

/// All steps, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan(Vec<Step>);

impl Plan {
    /// What has to be done before a guest with these primaries can be moved, after what `ledger` holds already.
    #[must_use]
    pub fn of(primaries: &[Primary], ledger: &Ledger) -> Plan {
        let steps: Vec<Step> = primaries.iter().flat_map(steps_for).collect();
        if steps.is_empty() {
            return Plan::default();
        }
        let earlier = ledger.0.iter().filter(|step| !matches!(step, Step::Remember(_)));
        let traces = earlier.chain(&steps).filter(|step| step.leaves_a_trace()).cloned().collect();
        Plan([Step::Remember(traces)].into_iter().chain(steps).collect())
    }

    /// The steps.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.0
    }
}

/// The primary's link stays up until the guest lets go of it: Linux's `net_failover` sends by the standby as soon as the
/// primary has no link, and yet drops whatever arrives by the standby for as long as the primary is registered
/// (`net_failover_handle_frame`). Taking the link down first would cost every frame to the guest from then on.
fn steps_for(primary: &Primary) -> Vec<Step> {
    let standby = primary.standby.id.clone();
    let plug = primary.standby.to_plug.clone().map(Step::PlugStandby);
    let wait = Step::AwaitStandby(standby.clone());
    let leave = [wait, Step::Unplug(primary.options.clone()), Step::AwaitTraffic(standby)];
    plug.into_iter().chain(leave).collect()
}

/// Who carries steps out.
pub trait Hands {
    /// Does a step.
    fn perform(&mut self, step: &Step) -> Result<(), GuestError>;
    /// Undoes a step that was done, or done by half, or not at all: what it asks for may be so already.
    fn undo(&mut self, step: &Step) -> Result<(), GuestError>;
}

/// What was done and is not undone.
#[derive(Debug, Default)]
pub struct Ledger(Vec<Step>);

impl Ledger {
    /// A ledger of what somebody else did, who left word of it and died.
    #[must_use]
    pub fn adopt(steps: Vec<Step>) -> Ledger {
        let word = (!steps.is_empty()).then(|| Step::Remember(steps.clone()));
        Ledger(word.into_iter().chain(steps).collect())
    }

    /// Whether there is nothing to undo.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Carries a plan out. When a step fails everything is undone, this step first, and the error says what could not be.
    pub fn carry_out(&mut self, plan: &Plan, hands: &mut dyn Hands) -> Result<(), GuestError> {
        for step in plan.steps() {
            match (step, self.0.first_mut()) {
                // The word is the first to come and the last to go, also where another one was there.
                (Step::Remember(_), Some(first)) => *first = step.clone(),
                _ => self.0.push(step.clone()),
            }
            if let Err(error) = hands.perform(step) {
                return Err(self.undo_all(hands).iter().fold(error, |first, next| also(&first, next)));
            }
        }
        Ok(())
    }

    /// Undoes everything, the last step first. What fails is kept, so that it can be tried again; so is what a failure
    /// makes necessary: the standby of a guest whose primary cannot come back, and the word left in the VMM.
    pub fn undo_all(&mut self, hands: &mut dyn Hands) -> Vec<GuestError> {
        let mut failed = Vec::new();
        let mut kept = Vec::new();
        for step in std::mem::take(&mut self.0).into_iter().rev().filter(Step::leaves_a_trace) {
            if step.is_needed_by(&kept) {
                kept.push(step);
            } else if let Err(error) = hands.undo(&step) {
                failed.push(error);
                kept.push(step);
            }
        }
        kept.reverse();
        self.0 = kept;
        failed
    }

    /// The guest is gone to its target: nothing is undone any more.
    pub fn close(&mut self) {
        self.0.clear();
    }
}

/// One sentence of two errors; who is to blame for the first is to blame.
fn also(first: &GuestError, second: &GuestError) -> GuestError {
    let joined = format!("{first}; and then: {second}");
    match first {
        GuestError::UserMistake(_) => GuestError::UserMistake(joined),
        GuestError::Unresponsive(_) | GuestError::Cancelled => GuestError::Unresponsive(joined),
        GuestError::Bug(_) => GuestError::Bug(joined),
        GuestError::HostRefused { .. }
        | GuestError::GuestMisbehaved(_)
        | GuestError::Ended(_)
        | GuestError::Relay(_) => GuestError::GuestMisbehaved(joined),
    }
}

#[cfg(test)]
mod tests {
    use super::super::ScriptedHands;
    use super::*;

    fn primary(id: &str, plugs_standby: bool) -> Primary {
        let standby = DeviceOptions::new("virtio-net-pci", &format!("{id}-standby"));
        Primary {
            options: DeviceOptions::new("vfio-pci", id),
            standby: Standby { id: standby.id().into(), to_plug: plugs_standby.then_some(standby) },
        }
    }

    fn plan() -> Plan {
        Plan::of(&[primary("a", false), primary("b", true)], &Ledger::default())
    }

    const DONE: [&str; 8] = [
        "remember",
        "await-standby a-standby",
        "unplug a",
        "await-traffic a-standby",
        "plug-standby b-standby",
        "await-standby b-standby",
        "unplug b",
        "await-traffic b-standby",
    ];

    #[test]
    fn a_guest_without_primaries_needs_nothing() {
        assert_eq!(Plan::of(&[], &Ledger::default()).steps(), []);
    }

    #[test]
    fn steps_are_done_in_order_and_undone_in_reverse() {
        let (mut hands, mut ledger) = (ScriptedHands::default(), Ledger::default());
        ledger.carry_out(&plan(), &mut hands).unwrap();
        assert_eq!(hands.take_story(), DONE);
        assert!(ledger.undo_all(&mut hands).is_empty());
        assert_eq!(
            hands.take_story(),
            ["undo unplug b", "undo plug-standby b-standby", "undo unplug a", "undo remember"]
        );
        assert!(ledger.is_empty());
    }

    #[test]
    fn whatever_step_fails_it_and_all_before_are_undone() {
        for (failing, name) in DONE.iter().enumerate() {
            let (mut hands, mut ledger) = (ScriptedHands::failing_at(name), Ledger::default());
            let error = ledger.carry_out(&plan(), &mut hands).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
            let done = &DONE[..=failing];
            let undone = done.iter().rev().filter(|step| !step.starts_with("await"));
            let story: Vec<String> = done.iter().map(|step| (*step).to_owned()).collect();
            let story: Vec<String> =
                story.into_iter().chain(undone.map(|step| format!("undo {step}"))).collect();
            assert_eq!(hands.take_story(), story, "failing at {name}");
            assert!(ledger.is_empty(), "failing at {name}");
        }
    }

    #[test]
    fn what_cannot_be_undone_is_said_kept_and_tried_again() {
        for stuck in ["undo unplug a", "undo plug-standby b-standby"] {
            let (mut hands, mut ledger) = (ScriptedHands::failing_at(stuck), Ledger::default());
            ledger.carry_out(&plan(), &mut hands).unwrap();
            hands.take_story();
            assert_eq!(ledger.undo_all(&mut hands).len(), 1, "{stuck}");
            let story = hands.take_story();
            assert!(!story.contains(&"undo remember".to_owned()), "the word must stay in the VMM: {story:?}");
            hands.fail_no_more();
            assert!(ledger.undo_all(&mut hands).is_empty());
            assert_eq!(hands.take_story(), [stuck, "undo remember"]);
        }
    }

    #[test]
    fn a_guest_whose_primary_cannot_come_back_keeps_its_standby() {
        let (mut hands, mut ledger) = (ScriptedHands::failing_at("undo unplug b"), Ledger::default());
        ledger.carry_out(&plan(), &mut hands).unwrap();
        hands.take_story();
        assert_eq!(ledger.undo_all(&mut hands).len(), 1);
        assert_eq!(hands.take_story(), ["undo unplug b", "undo unplug a"]);
        hands.fail_no_more();
        assert!(ledger.undo_all(&mut hands).is_empty());
        assert_eq!(hands.take_story(), ["undo unplug b", "undo plug-standby b-standby", "undo remember"]);
    }

    #[test]
    fn a_failure_with_a_failed_undoing_tells_both() {
        let mut hands = ScriptedHands::failing_at("unplug b").and_at("undo unplug a");
        let mut ledger = Ledger::default();
        let error = ledger.carry_out(&plan(), &mut hands).unwrap_err().to_string();
        assert!(
            error.contains("unplug b") && error.contains("and then") && error.contains("undo unplug a"),
            "{error}"
        );
    }

    #[test]
    fn a_moved_guest_is_not_given_its_device_again() {
        let (mut hands, mut ledger) = (ScriptedHands::default(), Ledger::default());
        ledger.carry_out(&plan(), &mut hands).unwrap();
        ledger.close();
        hands.take_story();
        assert!(ledger.undo_all(&mut hands).is_empty());
        assert!(hands.take_story().is_empty());
    }

    #[test]
    fn the_word_left_for_others_holds_all_that_is_to_be_undone() {
        let plan = plan();
        let Step::Remember(word) = &plan.steps()[0] else { panic!("it comes first") };
        let json = serde_json::to_string(word).unwrap();
        let mut ledger = Ledger::adopt(serde_json::from_str(&json).unwrap());
        let mut hands = ScriptedHands::default();
        assert!(ledger.undo_all(&mut hands).is_empty());
        assert_eq!(
            hands.take_story(),
            ["undo unplug b", "undo plug-standby b-standby", "undo unplug a", "undo remember"]
        );
    }

    #[test]
    fn what_a_dead_sender_did_is_undone_with_what_came_after() {
        let dead = vec![Step::Unplug(DeviceOptions::new("vfio-pci", "old"))];
        let mut ledger = Ledger::adopt(dead.clone());
        let plan = Plan::of(&[primary("a", false)], &ledger);
        let Step::Remember(word) = &plan.steps()[0] else { panic!("it comes first") };
        assert_eq!((word.len(), &word[0]), (2, &dead[0]));
        let mut hands = ScriptedHands::default();
        ledger.carry_out(&plan, &mut hands).unwrap();
        hands.take_story();
        assert!(ledger.undo_all(&mut hands).is_empty());
        assert_eq!(hands.take_story(), ["undo unplug a", "undo unplug old", "undo remember"]);
    }
}
