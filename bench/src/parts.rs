//! One lane against the raw cost of its parts, pair by pair.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use bytesize::ByteSize;
use clap::Args;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde::Serialize;
use vmferry_datapath::{Access, CHUNK_BYTES, ChunkIndex, Cipher, GuestRam, fastest_provider};

use crate::lane::{self, CORES};
use crate::measure::{Spread, cell, now};
use crate::memory::Memory;
use crate::output::Output;
use crate::ring;

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
    name: String,
    rates: Vec<f64>,
    /// The row of the raw cost, none where this is one.
    against: Option<usize>,
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
        lane::over_memory(&source_ram, &target_ram, Cipher::Plain)?;
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
    pin(CORES.0)?;
    let mut rows = rows(&[
        ("plain copy to a hot buffer", None),
        ("gather of a lane", Some(0)),
        ("zero-page check", None),
    ]);
    let mut buffer = vec![0_u8; CHUNK_BYTES];
    let flat = vec![7_u8; field.source.len()];
    for _ in 0..field.pairs {
        rows[0].rates.push(field.rate_of(|| {
            flat.chunks(CHUNK_BYTES)
                .for_each(|chunk| buffer[..chunk.len()].copy_from_slice(std::hint::black_box(chunk)));
            Ok(())
        })?);
        rows[1].rates.push(field.rate_of(|| {
            field.chunks().for_each(|chunk| {
                std::hint::black_box(field.source_ram.gather(chunk, u64::MAX, &mut buffer));
            });
            Ok(())
        })?);
        rows[2].rates.push(field.rate_of(|| {
            let data: u64 = field
                .chunks()
                .map(|chunk| u64::from(field.source_ram.data_pages(chunk, u64::MAX).count_ones()))
                .sum();
            anyhow::ensure!(data > 0, "the bench's memory holds data");
            Ok(())
        })?);
    }
    finish(output, "page", "one core over guest memory, GB/s", &rows);
    Ok(())
}

/// A sealed lane without a network against AES-GCM alone.
pub(crate) fn seal(args: &PartsArgs, quick: bool, output: &mut Output) -> Result<()> {
    let field = Field::new(args, quick)?;
    let (provider, found) = fastest_provider();
    for (provider, rate) in &found {
        output.say(&format!("{provider:?} measured at start: {rate:.2} GB/s"));
    }
    let cipher = Cipher::Aes256Gcm(provider);
    let names = [
        (format!("AES-256-GCM alone ({} records)", ByteSize(CHUNK_BYTES as u64)), None),
        ("sealed lane over memory, busy core".to_owned(), Some(0)),
        ("sealed lane over memory, end to end".to_owned(), Some(0)),
        ("sealed lane over TCP, busy core".to_owned(), Some(0)),
    ];
    let mut rows: Vec<Row> =
        names.into_iter().map(|(name, against)| Row { name, rates: Vec::new(), against }).collect();
    for _ in 0..field.pairs {
        rows[0].rates.push(on_core(CORES.0, || aes_alone(&field))?);
        let memory = lane::over_memory(&field.source_ram, &field.target_ram, cipher)?;
        let tcp = lane::over_tcp(&field.source_ram, &field.target_ram, cipher)?;
        rows[1].rates.push(memory.busy_rate);
        rows[2].rates.push(memory.rate);
        rows[3].rates.push(tcp.busy_rate);
    }
    finish(output, "seal", &format!("{cipher}, one lane, GB/s"), &rows);
    Ok(())
}

/// A lane over loopback against a bare io_uring loop.
pub(crate) fn link(args: &PartsArgs, quick: bool, output: &mut Output) -> Result<()> {
    let field = Field::new(args, quick)?;
    let (provider, _) = fastest_provider();
    let mut rows = rows(&[("bare io_uring loop", None), ("plain lane", Some(0)), ("sealed lane", Some(0))]);
    for _ in 0..field.pairs {
        rows[0].rates.push(bare(&field)?);
        rows[1].rates.push(lane::over_tcp(&field.source_ram, &field.target_ram, Cipher::Plain)?.rate);
        let sealed = lane::over_tcp(&field.source_ram, &field.target_ram, Cipher::Aes256Gcm(provider))?;
        rows[2].rates.push(sealed.rate);
    }
    finish(output, "link", "TCP on loopback, one lane, sender and receiver a core each, GB/s", &rows);
    Ok(())
}

fn bare(field: &Field) -> Result<f64> {
    let (near, far) = lane::connected()?;
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            pin(CORES.1)?;
            ring::receive_all(&far, &field.target, CHUNK_BYTES)
        });
        field.rate_of(|| {
            on_core(CORES.0, || ring::send_all(&near, &field.source, CHUNK_BYTES))?;
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
            std::hint::black_box(tag.as_ref());
        }
        Ok(())
    })
}

/// Runs on a thread of its own, pinned to `core`.
fn on_core<T: Send>(core: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || pin(core).and_then(|()| work()));
        thread.join().map_err(|_| anyhow!("a measuring thread panicked"))?
    })
}

fn pin(core: usize) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut set = CpuSet::new();
    set.set(core % cores);
    sched_setaffinity(None, &set).context("a thread cannot be pinned here")
}

fn rows(names: &[(&str, Option<usize>)]) -> Vec<Row> {
    names
        .iter()
        .map(|(name, against)| Row { name: (*name).to_owned(), rates: Vec::new(), against: *against })
        .collect()
}

fn finish(output: &mut Output, key: &str, title: &str, rows: &[Row]) {
    let lines = rows.iter().map(|row| {
        let ratio =
            row.against.map_or_else(String::new, |raw| cell(Spread::of_ratios(&row.rates, &rows[raw].rates)));
        vec![row.name.clone(), cell(Spread::of(row.rates.iter().copied())), ratio]
    });
    let title = format!("{title} (min / median / max of {} pairs)", rows[0].rates.len());
    output.table(&title, &["", "GB/s", "of the first row"], lines.collect());
    output.keep(key, &rows);
}
