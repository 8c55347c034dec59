//! Which test runs on which host.

use std::fmt;

use vmferry_rig::RigError;

use crate::tests::TestBinary;

/// Where a test runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Where {
    /// On host a alone.
    A,
    /// On host b alone.
    B,
    /// On both, a half each.
    Both,
}

impl fmt::Display for Where {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Where::A => "a",
            Where::B => "b",
            Where::Both => "ab",
        })
    }
}

/// One test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) place: Where,
    pub(crate) binary: String,
    pub(crate) test: String,
}

/// All tests of a run, in order: those of both hosts first, while neither is ahead of the other, then those of one host,
/// shared out among the two.
#[derive(Debug, Clone, Default)]
pub(crate) struct Plan {
    steps: Vec<Step>,
}

impl Plan {
    /// The tests whose `binary::name` contains `filter`.
    pub(crate) fn make(binaries: &[TestBinary], filter: Option<&str>) -> Result<Plan, RigError> {
        let mut plan = Plan::default();
        let (mut of_one, mut of_two) = (Vec::new(), Vec::new());
        for binary in binaries {
            if binary.tests.is_empty() {
                return Err(RigError::Missing(format!("{} has no test", binary.name)));
            }
            let two = binary.name.starts_with("lab2_");
            let name = |test: &String| format!("{}::{test}", binary.name);
            let wanted = |test: &&String| filter.is_none_or(|filter| name(test).contains(filter));
            let tests = binary.tests.iter().filter(wanted).map(|test| (binary.name.clone(), test.clone()));
            if two { of_two.extend(tests) } else { of_one.extend(tests) }
        }
        let both = |(binary, test)| Step { place: Where::Both, binary, test };
        plan.steps.extend(of_two.into_iter().map(both));
        let places = [Where::A, Where::B].into_iter().cycle();
        let alone = |((binary, test), place)| Step { place, binary, test };
        plan.steps.extend(of_one.into_iter().zip(places).map(alone));
        Ok(plan)
    }

    /// Every binary at hand, and nothing to run.
    pub(crate) fn whole(binaries: &[TestBinary]) -> Plan {
        Plan::make(binaries, None).unwrap_or_default()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    pub(crate) fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The hosts that have something to do.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = &'static str> + '_ {
        let uses = |host: &str| self.steps.iter().any(|step| step.place.to_string().contains(host));
        ["a", "b"].into_iter().filter(move |host| uses(host))
    }

    /// Whether a binary has a test in it.
    pub(crate) fn names(&self, binary: &str) -> bool {
        self.steps.iter().any(|step| step.binary == binary)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.steps.iter().try_for_each(|step| writeln!(f, "{} {} {}", step.place, step.binary, step.test))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binary(name: &str, tests: &[&str]) -> TestBinary {
        let tests = tests.iter().map(|test| (*test).to_owned()).collect();
        TestBinary { name: name.to_owned(), file: "/nowhere".into(), tests }
    }

    #[test]
    fn one_host_tests_are_shared_out_and_two_host_tests_run_on_both() {
        let binaries = [binary("lab_x", &["one", "two", "three"]), binary("lab2_y", &["move"])];
        let plan = Plan::make(&binaries, None).unwrap();
        assert_eq!(plan.to_string(), "ab lab2_y move\na lab_x one\nb lab_x two\na lab_x three\n");
        assert_eq!(
            Plan::make(&binaries, Some("lab_x::t")).unwrap().to_string(),
            "a lab_x two\nb lab_x three\n"
        );
        assert!(Plan::make(&binaries, Some("nothing")).unwrap().is_empty());
        assert!(Plan::make(&[binary("lab_z", &[])], None).is_err(), "a binary without tests is a mistake");
    }
}
