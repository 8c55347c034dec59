//! The `vmferry` command.

use std::process::ExitCode;

use clap::Parser;
use vmferry::cli::{Cli, InspectArgs, KeysVerb, Verb};
use vmferry::failure::{EXIT_CODES, Failure};
use vmferry::report::MoveReport;
use vmferry::{blame, demo, doctor, guardian, inspect, keys, receive, send};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = tracing_subscriber::EnvFilter::try_from_env("VMFERRY_LOG").unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(level).with_writer(std::io::stderr).without_time().init();
    match cli.verb {
        Verb::Send(args) => tell(send::send(&args), args.json),
        Verb::Receive(args) => tell(receive::receive(&args), args.json),
        Verb::Keys(KeysVerb::Init(args)) => match keys::init(&args.dir, &args.hosts) {
            Ok(written) => {
                written.iter().for_each(|path| println!("{}", path.display()));
                ExitCode::SUCCESS
            }
            Err(failure) => refuse(&failure),
        },
        Verb::Demo(args) => match demo::demo(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => refuse(&failure),
        },
        Verb::Doctor(args) => doctor_verb(args.json),
        Verb::Inspect(args) => inspect_verb(&args),
        Verb::Workload(args) => match vmferry_guest::process::run(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => refuse(&blame::refused_guest(&error)),
        },
        Verb::MicroVm(args) => match vmferry_guest::kvm::run(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => refuse(&blame::refused_guest(&error)),
        },
        Verb::ExitCodes => {
            EXIT_CODES.iter().for_each(|(code, meaning)| println!("{code:>4}  {meaning}"));
            ExitCode::SUCCESS
        }
        Verb::Guardian(args) => guardian::run(&args.guest),
    }
}

/// The report on stdout, the sentence on stderr, the blame as exit code.
fn tell((report, result): (MoveReport, Result<(), Failure>), json: bool) -> ExitCode {
    if json {
        match serde_json::to_string(&report) {
            Ok(line) => println!("{line}"),
            Err(error) => eprintln!("vmferry: the report could not be written: {error}"),
        }
    } else if result.is_ok() {
        println!("{}", report.to_table());
    }
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => refuse(&failure),
    }
}

fn refuse(failure: &Failure) -> ExitCode {
    eprintln!("vmferry: {failure}");
    ExitCode::from(failure.exit_code())
}

fn inspect_verb(args: &InspectArgs) -> ExitCode {
    let seen = match vmferry_guest::inspect::inspect(&args.guest) {
        Ok(seen) => seen,
        Err(error) => return refuse(&blame::refused_guest(&error)),
    };
    if !args.json {
        println!("{}", inspect::to_table(&seen));
        return ExitCode::SUCCESS;
    }
    match serde_json::to_string(&seen) {
        Ok(line) => println!("{line}"),
        Err(error) => eprintln!("vmferry: what was found could not be written: {error}"),
    }
    ExitCode::SUCCESS
}

fn doctor_verb(json: bool) -> ExitCode {
    let findings = doctor::examine();
    if json {
        match serde_json::to_string(&serde_json::json!({ "findings": findings })) {
            Ok(line) => println!("{line}"),
            Err(error) => eprintln!("vmferry: the findings could not be written: {error}"),
        }
    } else {
        println!("{}", doctor::to_table(&findings));
    }
    let blocked = findings.iter().any(|finding| finding.verdict == doctor::Verdict::Blocks);
    ExitCode::from(if blocked { 1 } else { 0 })
}
