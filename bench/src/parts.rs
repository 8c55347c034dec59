//! One lane against the raw cost of its parts, pair by pair.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use bytesize::ByteSize;
use clap::Args;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde::Serialize;
use vmferry_datapath::probe::{self, Cpus, Measured};
use vmferry_datapath::{Access, CHUNK_BYTES, ChunkIndex, Cipher, GuestRam, fastest_provider};

use crate::measure::{Spread, cell, now};
use crate::memory::Memory;
use crate::output::Output;
use crate::ring;

/// The core that sends, and the core that receives.
const CORES: Cpus = Cpus { sender: Some(0), receiver: Some(1) };
const GIGA: f64 = 1e9;
const QUICK_BYTES: u64 = 64 << 20;

/// `vmferry-bench page|seal|link`
#[derive(Debug, Args)]
pub(crate) struct PartsArgs {
    /// Memory that is walked.
    #[arg(long, default_value = "512MiB")]
    memory: ByteSize,
    /// Pairs of raw and lane.
    #[arg(long, default_value_t = 7)]
    pairs: usize,
}

/// A row of rates in GB/s, and what it is held against.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    rates: Vec<f64>,
    /// CPU seconds of both ends for each GiB.
    cpu: Vec<f64>,
    /// The row of the raw cost, none where this is one.
    against: Option<usize>,
}

impl Row {
    fn add(&mut self, measured: Measured) {
        self.rates.push(measured.gb_per_s());
        self.cpu.push(measured.cpu_s_per_gib());
    }
}

struct Field {
    source: Memory,
    target: Memory,
    source_ram: Arc<GuestRam>,
    target_ram: Arc<GuestRam>,
    pairs: usize,
}

impl Field {
    fn new(args: &PartsArgs, quick: bool) -> Result<Self> {
        let bytes = if quick { QUICK_BYTES } else { args.memory.as_u64() };
        let bytes = usize::try_from(bytes)?.next_multiple_of(CHUNK_BYTES);
        let (source, target) = (Memory::filled(bytes)?, Memory::filled(bytes)?);
        let source_ram = source.guest_ram(Access::ReadOnly)?;
        let target_ram = target.guest_ram(Access::ReadWrite)?;
        // The first walk over a fresh mapping pays for its page faults, once in a guest's life and not per pair.
        probe::lane(&source_ram, &target_ram, Cipher::Plain, CORES)?;
        Ok(Self { source, target, source_ram, target_ram, pairs: if quick { 2 } else { args.pairs } })
    }

    fn gigabytes(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a byte count of memory is far below 2^52")]
        let bytes = self.source.len() as f64;
        bytes / GIGA
    }

    fn chunks(&self) -> impl Iterator<Item = ChunkIndex> + use<> {
        (0..self.source_ram.layout().chunk_count()).map(ChunkIndex)
    }

    /// Gigabytes a second of something that walks all of the memory once.
    fn rate_of(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let start = now();
        work()?;
        Ok(self.gigabytes() / start.elapsed().as_secs_f64())
    }
}

/// Zero pages and copies: what guest memory costs to look at.
pub(crate) fn page(args: &PartsArgs, quick: bool, output: &mut Output) -> Result<()> {
    let field = Field::new(args, quick)?;
    pin(CORES.sender)?;
    let mut rows = rows(&[
        ("plain copy to a hot buffer", None),
        ("gather of a lane", Some(0)),
        ("zero-page search", None),
        ("whole plain sending lane, into a link that discards", Some(0)),
    ]);
    let mut buffer = vec![0_u8; CHUNK_BYTES];
    let flat = vec![7_u8; field.source.len()];
    for _ in 0..field.pairs {
        rows[0].rates.push(field.rate_of(|| {
            flat.chunks(CHUNK_BYTES)
                .for_each(|chunk| buffer[..chunk.len()].copy_from_slice(black_box(chunk)));
            Ok(())
        })?);
        rows[1].rates.push(field.rate_of(|| {
            field.chunks().for_each(|chunk| {
                black_box(field.source_ram.gather(chunk, u64::MAX, &mut buffer));
            });
            Ok(())
        })?);
        rows[2].add(probe::scan(&field.source_ram)?);
        rows[3].add(probe::page(&field.source_ram, Cipher::Plain)?);
    }
    finish(output, "page", "one core over guest memory", &rows);
    Ok(())
}

/// A sealed sending lane against AES-GCM alone.
pub(crate) fn seal(args: &PartsArgs, quick: bool, output: &mut Output) -> Result<()> {
    let field = Field::new(args, quick)?;
    pin(CORES.sender)?;
    let (provider, found) = fastest_provider();
    for (provider, rate) in &found {
        output.say(&format!("{provider:?} measured at start: {rate:.2} GB/s"));
    }
    let cipher = Cipher::Aes256Gcm(provider);
    let mut rows = rows(&[
        ("AES-256-GCM alone over guest memory, 256 KiB records", None),
        ("whole sealed sending lane, into a link that discards", Some(0)),
        ("AES-256-GCM alone over one hot buffer", Some(0)),
        ("aws-lc-rs by its safe interface over one hot buffer", Some(0)),
    ]);
    for _ in 0..field.pairs {
        rows[0].add(probe::seal(&field.source_ram, cipher)?);
        rows[1].add(probe::page(&field.source_ram, cipher)?);
        rows[2].add(probe::seal_hot(field.source.len() as u64, cipher)?);
        rows[3].rates.push(aes_alone(&field)?);
    }
    finish(output, "seal", &format!("{cipher}, one core"), &rows);
    Ok(())
}

/// A lane over loopback against a bare io_uring loop.
pub(crate) fn link(args: &PartsArgs, quick: bool, output: &mut Output) -> Result<()> {
    let field = Field::new(args, quick)?;
    let (provider, _) = fastest_provider();
    let sealed = Cipher::Aes256Gcm(provider);
    let mut rows = rows(&[
        ("bare io_uring loop, one hot buffer to nowhere", None),
        ("bare io_uring loop, memory to memory", Some(0)),
        ("plain lane", Some(0)),
        ("sealed lane", Some(0)),
    ]);
    for _ in 0..field.pairs {
        rows[0].add(probe::bare(field.source.len() as u64, CHUNK_BYTES, CORES)?);
        rows[1].rates.push(bare(&field)?);
        rows[2].add(probe::lane(&field.source_ram, &field.target_ram, Cipher::Plain, CORES)?);
        rows[3].add(probe::lane(&field.source_ram, &field.target_ram, sealed, CORES)?);
    }
    finish(output, "link", "TCP on loopback, one lane, a core for each end", &rows);
    Ok(())
}

fn bare(field: &Field) -> Result<f64> {
    let (near, far) = probe::loopback()?;
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            pin(CORES.receiver)?;
            ring::receive_all(&far, &field.target, CHUNK_BYTES)
        });
        field.rate_of(|| {
            on_core(CORES.sender, || ring::send_all(&near, &field.source, CHUNK_BYTES))?;
            receiving.join().map_err(|_| anyhow!("the receiving thread panicked"))?
        })
    })
}

fn aes_alone(field: &Field) -> Result<f64> {
    let key = UnboundKey::new(&AES_256_GCM, &[3; 32]).map_err(|_| anyhow!("AES-256-GCM refuses its key"))?;
    let key = LessSafeKey::new(key);
    let mut buffer = vec![5_u8; CHUNK_BYTES];
    field.rate_of(|| {
        for chunk in field.chunks() {
            let mut nonce = [0; 12];
            nonce[4..].copy_from_slice(&chunk.0.to_le_bytes());
            let nonce = Nonce::assume_unique_for_key(nonce);
            let sealed = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut buffer);
            let tag = sealed.map_err(|_| anyhow!("AES-256-GCM refuses to seal"))?;
            black_box(tag.as_ref());
        }
        Ok(())
    })
}

/// Runs on a thread of its own, pinned to `core`.
fn on_core<T: Send>(core: Option<usize>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || pin(core).and_then(|()| work()));
        thread.join().map_err(|_| anyhow!("a measuring thread panicked"))?
    })
}

fn pin(core: Option<usize>) -> Result<()> {
    let Some(core) = core else { return Ok(()) };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut set = CpuSet::new();
    set.set(core % cores);
    sched_setaffinity(None, &set).context("a thread cannot be pinned here")
}

fn rows(names: &[(&'static str, Option<usize>)]) -> Vec<Row> {
    names
        .iter()
        .map(|(name, against)| Row { name, rates: Vec::new(), cpu: Vec::new(), against: *against })
        .collect()
}

fn finish(output: &mut Output, key: &str, title: &str, rows: &[Row]) {
    let lines = rows.iter().map(|row| {
        let ratio =
            row.against.map_or_else(String::new, |raw| cell(Spread::of_ratios(&row.rates, &rows[raw].rates)));
        let spread = |values: &[f64]| cell(Spread::of(values.iter().copied()));
        vec![row.name.to_owned(), spread(&row.rates), ratio, spread(&row.cpu)]
    });
    let title = format!("{title} (min / median / max of {} pairs)", rows[0].rates.len());
    output.table(&title, &["", "GB/s", "of the first row", "CPU s/GiB, both ends"], lines.collect());
    output.keep(key, &rows);
}
