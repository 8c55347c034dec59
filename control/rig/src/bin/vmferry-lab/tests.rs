//! The lab's test binaries: built by cargo under the names `lab_*` and `lab2_*`, and asked for their tests.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use vmferry_rig::RigError;

/// One built test binary.
#[derive(Debug, Clone)]
pub(crate) struct TestBinary {
    /// The target's name: `lab_kvm`.
    pub(crate) name: String,
    /// The program.
    pub(crate) file: PathBuf,
    /// Its tests.
    pub(crate) tests: Vec<String>,
}

/// Builds the workspace's programs and lab tests, and lists the tests. A filter that names a binary, alone or before
/// `::`, has no other one built.
pub(crate) fn build(filter: Option<&str>) -> Result<Vec<TestBinary>, RigError> {
    cargo(&["build", "--workspace", "--bins"])?;
    let mut names = target_names()?;
    let named = filter.and_then(|filter| filter.split("::").next());
    if names.iter().any(|name| Some(name.as_str()) == named) {
        names.retain(|name| Some(name.as_str()) == named);
    }
    if names.is_empty() {
        return Err(RigError::Missing(
            "no crate has a test named lab_*: is this the vmferry workspace?".into(),
        ));
    }
    let mut words = vec!["test", "--workspace", "--no-run", "--message-format=json"];
    for name in &names {
        words.extend(["--test", name]);
    }
    let output = cargo(&words)?;
    let messages = output.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let built = messages.filter_map(|message| {
        let name =
            message["target"]["name"].as_str().filter(|name| names.iter().any(|wanted| wanted == name))?;
        Some((name.to_owned(), PathBuf::from(message["executable"].as_str()?)))
    });
    let binaries = built
        .map(|(name, file)| Ok(TestBinary { tests: list(&file)?, name, file }))
        .collect::<Result<Vec<_>, RigError>>()?;
    if binaries.len() == names.len() {
        return Ok(binaries);
    }
    Err(RigError::Missing(format!("of the lab tests {names:?} only {} were built", binaries.len())))
}

/// The workspace's test targets whose name begins with `lab`.
fn target_names() -> Result<Vec<String>, RigError> {
    let metadata = cargo(&["metadata", "--no-deps", "--format-version=1"])?;
    let metadata: Value = serde_json::from_str(&metadata)
        .map_err(|error| RigError::Missing(format!("cargo metadata is not readable: {error}")))?;
    let targets = metadata["packages"].as_array().into_iter().flatten();
    let targets = targets.flat_map(|package| package["targets"].as_array().into_iter().flatten());
    let tests = targets.filter(|target| target["kind"][0] == "test");
    let names = tests.filter_map(|target| target["name"].as_str());
    let mut names: Vec<String> = names
        .filter(|name| name.starts_with("lab_") || name.starts_with("lab2_"))
        .map(str::to_owned)
        .collect();
    names.sort();
    Ok(names)
}

fn list(file: &Path) -> Result<Vec<String>, RigError> {
    let output = run(Command::new(file).args(["--list", "--format", "terse"]))?;
    Ok(output.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

fn cargo(words: &[&str]) -> Result<String, RigError> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let quiet: &[&str] = if words[0] == "metadata" { &[] } else { &["--quiet"] };
    run(Command::new(program).args(words).arg("--locked").args(quiet))
}

fn run(command: &mut Command) -> Result<String, RigError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stderr(Stdio::inherit()).stdin(Stdio::null()).output();
    let output = output.map_err(|source| crate::host_error(&format!("cannot run {name}"), source))?;
    if !output.status.success() {
        return Err(RigError::Missing(format!("{name} failed ({}): see above", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
