//! The bench measures and asserts nothing: a figure is printed with its spread, and judged by the reader.
//!
//! ```text
//!   page, seal, link      one lane against the raw cost of its parts
//!   migrate               the same guest moved by QEMU and by vmferry
//!   downtime              many moves there and back: histograms, plot, calibration of the prediction
//!   growth                time against guest size
//!   rdma                  operations, system calls and instructions for each GiB, over TCP and over RDMA
//! ```

#[cfg(feature = "rdma")]
mod carry;
mod cpu;
mod downtime;
mod ferry;
mod growth;
mod guest;
mod histogram;
#[cfg(feature = "rdma")]
mod instructions;
mod measure;
mod memory;
mod migrate;
#[cfg(feature = "rdma")]
mod operations;
mod output;
mod parts;
mod plot;
mod qemu_move;
mod ring;
mod scenario;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::output::Output;

/// Measures vmferry on this machine. Every run is bounded in time; --quick makes it small.
#[derive(Debug, Parser)]
#[command(name = "vmferry-bench", version)]
struct Cli {
    /// One JSON object as the last line of stdout.
    #[arg(long, global = true)]
    json: bool,
    /// Few and small runs: says that the bench works, not how fast vmferry is.
    #[arg(long, global = true)]
    quick: bool,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// What guest memory costs to look at: copies and zero pages.
    Page(parts::PartsArgs),
    /// A sealed sending lane against AES-GCM alone.
    Seal(parts::PartsArgs),
    /// A lane over loopback against a bare io_uring loop.
    Link(parts::PartsArgs),
    /// The same guest moved by QEMU (plain, multifd, multifd with TLS) and by vmferry.
    Migrate(migrate::MigrateArgs),
    /// Many moves there and back: how long the guest was away, as a table, an .hlog and a plot.
    Downtime(downtime::DowntimeArgs),
    /// Time against guest size.
    Growth(growth::GrowthArgs),
    /// Operations, system calls and instructions for each GiB, over TCP and over RDMA.
    #[cfg(feature = "rdma")]
    Rdma(operations::RdmaArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut output = Output::new(cli.json);
    let done = match &cli.what {
        What::Page(args) => parts::page(args, cli.quick, &mut output),
        What::Seal(args) => parts::seal(args, cli.quick, &mut output),
        What::Link(args) => parts::link(args, cli.quick, &mut output),
        What::Migrate(args) => migrate::run(args, cli.quick, &mut output),
        What::Downtime(args) => downtime::run(args, cli.quick, &mut output),
        What::Growth(args) => growth::run(args, cli.quick, &mut output),
        #[cfg(feature = "rdma")]
        What::Rdma(args) => operations::run(args, cli.quick, &mut output),
    };
    output.finish();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmferry-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
