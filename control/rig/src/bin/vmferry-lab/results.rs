//! What came back from the hosts, held against the plan.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::plan::{Plan, Step};

/// Marks a line that the lab's init wrote; all others are noise.
const MARK: &str = "@lab ";

/// What is known of one test on one host.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    NotReported,
    Started,
    Passed,
    Failed(String),
}

/// The results of a run.
pub(crate) struct Results {
    steps: Vec<Step>,
    /// By host, binary and test.
    states: BTreeMap<(String, String, String), State>,
    over: Vec<String>,
    troubles: usize,
}

impl Results {
    pub(crate) fn new(plan: &Plan) -> Results {
        let mut states = BTreeMap::new();
        for step in plan.steps() {
            for host in step.place.to_string().chars() {
                let key = (host.to_string(), step.binary.clone(), step.test.clone());
                states.insert(key, State::NotReported);
            }
        }
        Results { steps: plan.steps().to_vec(), states, over: Vec::new(), troubles: 0 }
    }

    /// Takes one line of a host in.
    pub(crate) fn heard(&mut self, host: &str, line: &str) {
        let Some((_, line)) = line.split_once(MARK) else { return };
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        match verb {
            "up" => println!("lab: host {host} is up after {rest} s"),
            "trouble" => self.trouble(host, &format!("lacks something: {rest}"), ""),
            "say" => println!("     {host}: {rest}"),
            "start" => self.set(host, rest, State::Started),
            "done" => self.done(host, rest),
            "over" => self.over.push(host.to_owned()),
            _ => {}
        }
    }

    fn set(&mut self, host: &str, words: &str, state: State) {
        let Some((binary, test)) = words.split_once(' ') else { return };
        let key = (host.to_owned(), binary.to_owned(), test.to_owned());
        // A name outside of the plan proves nothing.
        if let Some(place) = self.states.get_mut(&key) {
            *place = state;
        }
    }

    fn done(&mut self, host: &str, rest: &str) {
        let words: Vec<&str> = rest.split_whitespace().collect();
        let [binary, test, code, began, ended] = words[..] else { return };
        let number = |text: &str| text.parse::<f64>().unwrap_or(0.0);
        let took = number(ended) - number(began);
        let state = match code {
            "0" => State::Passed,
            "250" => State::Failed("ended well without having run a test".into()),
            "251" => State::Failed("skipped itself: in the lab everything is there".into()),
            "124" | "137" | "143" => State::Failed("took too long".into()),
            code => State::Failed(format!("exit code {code}")),
        };
        match &state {
            State::Failed(why) => println!("FAIL {host} {binary}::{test} ({took:.1} s): {why}"),
            State::NotReported | State::Started | State::Passed => {
                println!("ok   {host} {binary}::{test} ({took:.1} s)")
            }
        }
        self.set(host, &format!("{binary} {test}"), state);
    }

    /// A host went wrong as a whole.
    pub(crate) fn trouble(&mut self, host: &str, what: &str, last_words: &str) {
        self.troubles += 1;
        println!("FAIL host {host} {what}");
        for line in last_words.lines() {
            println!("     {host}: {line}");
        }
    }

    /// A host ended; one that did not say `over` first panicked, or was ended.
    pub(crate) fn ended(&mut self, host: &str, last_words: &str) {
        if !self.over.iter().any(|name| name == host) {
            self.over.push(host.to_owned());
            self.trouble(host, "ended before its plan did (a kernel panic?)", last_words);
        }
    }

    /// Counts: (passed, failed), a test being passed when every host that has a half of it says so.
    fn counts(&self) -> (usize, usize) {
        let passed = |step: &&Step| {
            let mine =
                |(_, binary, test): &(String, String, String)| *binary == step.binary && *test == step.test;
            self.states.iter().filter(|(key, _)| mine(key)).all(|(_, state)| *state == State::Passed)
        };
        let passed = self.steps.iter().filter(passed).count();
        (passed, self.steps.len() - passed)
    }

    /// Prints the end; whether everything passed.
    pub(crate) fn conclude(&self, took: Duration) -> bool {
        for ((host, binary, test), state) in &self.states {
            match state {
                State::NotReported => println!("FAIL {host} {binary}::{test}: it never ran"),
                State::Started => println!("FAIL {host} {binary}::{test}: it began and never ended"),
                State::Passed | State::Failed(_) => {}
            }
        }
        let (passed, failed) = self.counts();
        println!("lab: {} s", took.as_secs());
        println!("lab: {passed} passed, {} failed", failed + self.troubles);
        failed == 0 && self.troubles == 0 && passed > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::TestBinary;

    fn results() -> Results {
        let binary = |name: &str, tests: &[&str]| TestBinary {
            name: name.to_owned(),
            file: "/nowhere".into(),
            tests: tests.iter().map(|test| (*test).to_owned()).collect(),
        };
        Results::new(
            &Plan::make(&[binary("lab_x", &["one", "two"]), binary("lab2_y", &["both"])], None).unwrap(),
        )
    }

    fn all(results: &mut Results, lines: &[(&str, &str)]) {
        lines.iter().for_each(|(host, line)| results.heard(host, line));
    }

    const GOOD: [(&str, &str); 6] = [
        ("a", "noise"),
        ("a", "noise @lab done lab_x one 0 1.0 2.0"),
        ("b", "@lab done lab_x two 0 1.0 2.0"),
        ("a", "@lab done lab2_y both 0 1.0 2.0"),
        ("b", "@lab done lab2_y both 0 1.0 2.0"),
        ("a", "@lab over"),
    ];

    #[test]
    fn only_a_whole_and_good_report_passes() {
        let mut good = results();
        all(&mut good, &GOOD);
        assert!(good.conclude(Duration::ZERO));
        for missing in 1..5 {
            let mut short = results();
            let lines: Vec<_> =
                GOOD.iter().enumerate().filter(|(n, _)| *n != missing).map(|(_, l)| *l).collect();
            all(&mut short, &lines);
            assert!(!short.conclude(Duration::ZERO), "line {missing} was missing");
        }
    }

    #[test]
    fn codes_silence_and_strangers_fail() {
        for code in ["1", "101", "124", "250", "251"] {
            let mut bad = results();
            all(&mut bad, &GOOD);
            bad.heard("a", &format!("@lab done lab_x one {code} 1 2"));
            assert!(!bad.conclude(Duration::ZERO), "{code}");
        }
        let mut stranger = results();
        all(&mut stranger, &[("a", "@lab done lab_x other 0 1 2")]);
        assert_eq!(stranger.counts(), (0, 3));
        let mut panicked = results();
        all(&mut panicked, &GOOD);
        panicked.ended("b", "Kernel panic - not syncing");
        assert!(!panicked.conclude(Duration::ZERO));
        panicked.ended("a", "");
        assert_eq!(panicked.troubles, 1, "host a had said that it was over");
    }
}
