//! The handover protocol, model-checked: every interleaving of messages, answers, timeouts, losses, cuts and deaths.
//!
//! A state of the model is the path that leads to it; two paths that end in the same world, by its `Debug` text, are
//! one state. `VMFERRY_FAULTS` tells longer stories.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use stateright::{Checker, Model, Property};
use vmferry_tests::handover::{Act, Facts, System};

/// Seconds on an idle host; a crowded one gets its time.
const TIME_MAX: Duration = Duration::from_secs(300);

/// A state of the model: the path to it, and what became of it.
#[derive(Clone, Debug)]
struct Path {
    acts: Vec<Act>,
    next: Vec<Act>,
    facts: Facts,
    print: u64,
}

impl Path {
    fn play(acts: Vec<Act>, faults: u8) -> Self {
        let mut system = System::at_switchover(faults);
        acts.iter().for_each(|act| system.apply(*act));
        let mut hasher = DefaultHasher::new();
        format!("{system:?}").hash(&mut hasher);
        let next = [system.due(), system.faults()].concat();
        Self { acts, next, facts: Facts::of(&system), print: hasher.finish() }
    }
}

impl Hash for Path {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.print.hash(state);
    }
}

impl PartialEq for Path {
    fn eq(&self, other: &Self) -> bool {
        self.print == other.print
    }
}

impl Eq for Path {}

/// All stories of a handover with at most so many faults.
struct Handover {
    faults: u8,
}

impl Model for Handover {
    type State = Path;
    type Action = Act;

    fn init_states(&self) -> Vec<Path> {
        vec![Path::play(vec![], self.faults)]
    }

    fn actions(&self, state: &Path, actions: &mut Vec<Act>) {
        actions.extend_from_slice(&state.next);
    }

    fn next_state(&self, last: &Path, act: Act) -> Option<Path> {
        Some(Path::play(last.acts.iter().copied().chain([act]).collect(), self.faults))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two runners", |_, path: &Path| path.facts.runners < 2),
            Property::always("a guest that runs at the target is whole", |_, path: &Path| !path.facts.torn),
            Property::always("no end is taken back", |_, path: &Path| path.facts.broken.is_none()),
            Property::always("a runner, or a name for the doubt", |_, path: &Path| {
                !path.facts.quiet || path.facts.runners == 1 || path.facts.named
            }),
            Property::always("nobody waits for nothing", |_, path: &Path| {
                path.facts.quiet || !path.facts.stuck
            }),
            Property::always("every report is true", |_, path: &Path| !path.facts.false_report),
            Property::sometimes("a move succeeds", |_, path: &Path| path.facts.moved),
            Property::sometimes("asking ends a doubt", |_, path: &Path| path.facts.moved_after_asking),
            Property::sometimes("a proof brings the guest back", |_, path: &Path| {
                path.facts.came_back_by_proof
            }),
            Property::sometimes("the guardian rescues", |_, path: &Path| path.facts.rescued),
            Property::sometimes("a doubt stays and is named", |_, path: &Path| path.facts.in_doubt),
        ]
    }
}

#[test]
fn no_interleaving_of_crash_loss_and_timeout_breaks_the_handover() {
    let faults = std::env::var("VMFERRY_FAULTS").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    let checker = Handover { faults }.checker().threads(2).timeout(TIME_MAX).spawn_bfs().join();
    println!(
        "{faults} faults: {} states, {} of them different",
        checker.state_count(),
        checker.unique_state_count()
    );
    checker.assert_properties();
    assert!(checker.is_done(), "the time was over before all stories were told");
    assert!(checker.unique_state_count() > 50_000, "the model lost most of its stories");
}
