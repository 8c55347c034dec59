//! How a move is done: pure functions over what both sides offered.
//!
//! The newest common version wins, the source's order of preference decides, and everything that does not fit is
//! refused before the first page, in a sentence that holds the exact fix. What must never happen: a cipher that only
//! one side wanted to be weak.

use serde::{Deserialize, Serialize};
use vmferry_datapath::{RamBlock, RamLayout};

use crate::error::{AbortKind, AbortReason, SessionError};
use crate::message::{AttemptId, GuestFacts, Offer};

/// The protocol version of this build.
pub const VERSION: u16 = 1;
/// The most lanes of a move; a source that offers more gets this many.
pub const LANES_MAX: u16 = 64;
/// Facts whose key begins so are for people and are not compared.
pub const NOTE_PREFIX: &str = "note-";

/// How records are protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CipherSuite {
    /// AES-256-GCM, one key per lane and direction.
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
    /// Nothing: `--insecure-plaintext` on both sides.
    Plaintext,
    /// A word of a later version.
    #[serde(other)]
    Other,
}

/// How records are made smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompressionMode {
    /// zstd, kept per record where it is smaller.
    Zstd,
    /// Not at all.
    Off,
    /// A word of a later version.
    #[serde(other)]
    Other,
}

/// What the target brings to the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetTerms {
    /// Protocol versions that it speaks.
    pub versions: Vec<u16>,
    /// Ciphers that it accepts: exactly one kind, sealed or plain.
    pub ciphers: Vec<CipherSuite>,
    /// Compressions that it can undo.
    pub compressions: Vec<CompressionMode>,
    /// Lanes that it takes at most.
    pub lanes_max: u16,
    /// The empty guest that waits.
    pub guest: GuestFacts,
}

/// How the move is done, decided by the target and checked by the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agreement {
    /// The attempt.
    pub attempt: AttemptId,
    /// Protocol version.
    pub version: u16,
    /// Cipher of all lanes.
    pub cipher: CipherSuite,
    /// Compression of all lanes.
    pub compression: CompressionMode,
    /// Lanes, 1 to [`LANES_MAX`].
    pub lanes: u16,
    /// Whether digests are compared.
    pub verify: bool,
}

/// The target's decision about an offer.
pub fn negotiate(offer: &Offer, terms: &TargetTerms) -> Result<Agreement, AbortReason> {
    let version = newest_common(&offer.versions, &terms.versions)?;
    let cipher = first_common_cipher(&offer.ciphers, &terms.ciphers)?;
    compare_guests(&offer.guest, &terms.guest)?;
    let lanes = offer.lanes.min(terms.lanes_max).min(LANES_MAX);
    if lanes == 0 {
        return Err(refuse("the source offered no lane; give --lanes 1 or more there"));
    }
    let known = |mode: &&CompressionMode| **mode != CompressionMode::Other;
    let common = offer.compressions.iter().filter(known).find(|&mode| terms.compressions.contains(mode));
    Ok(Agreement {
        attempt: offer.attempt,
        version,
        cipher,
        compression: common.copied().unwrap_or(CompressionMode::Off),
        lanes,
        verify: offer.verify,
    })
}

/// The source's check that the answer is one that it offered: a target cannot talk it down.
pub fn check_answer(offer: &Offer, answer: &Agreement) -> Result<(), SessionError> {
    let compression_fits =
        answer.compression == CompressionMode::Off || offer.compressions.contains(&answer.compression);
    let wrong = [
        (answer.attempt != offer.attempt, "its answer is about another attempt"),
        (!offer.versions.contains(&answer.version), "its answer names a version that was not offered"),
        (!offer.ciphers.contains(&answer.cipher), "its answer names a cipher that was not offered"),
        (!compression_fits, "its answer names a compression that was not offered"),
        (
            answer.lanes == 0 || answer.lanes > offer.lanes.min(LANES_MAX),
            "its answer names more lanes than offered, or none",
        ),
        (answer.verify != offer.verify, "its answer changes whether memory is verified"),
    ];
    match wrong.iter().find(|(is_wrong, _)| *is_wrong) {
        Some((_, what)) => Err(SessionError::PeerMisbehaved((*what).into())),
        None => Ok(()),
    }
}

fn refuse(sentence: &str) -> AbortReason {
    AbortReason::new(AbortKind::Incompatible, sentence)
}

fn newest_common(source: &[u16], target: &[u16]) -> Result<u16, AbortReason> {
    let common = source.iter().filter(|version| target.contains(version)).max();
    common.copied().ok_or_else(|| {
        refuse(&format!(
            "the source speaks protocol version {} and the target {}; install the same vmferry on both hosts",
            list(source),
            list(target)
        ))
    })
}

fn list(versions: &[u16]) -> String {
    let words: Vec<String> = versions.iter().map(u16::to_string).collect();
    if words.is_empty() { "none".into() } else { words.join(", ") }
}

fn first_common_cipher(source: &[CipherSuite], target: &[CipherSuite]) -> Result<CipherSuite, AbortReason> {
    let known = |cipher: &&CipherSuite| **cipher != CipherSuite::Other;
    if let Some(cipher) = source.iter().filter(known).find(|&cipher| target.contains(cipher)) {
        return Ok(*cipher);
    }
    let plain = |side: &[CipherSuite]| side.contains(&CipherSuite::Plaintext);
    let sentence = match (plain(source), plain(target)) {
        (true, false) => {
            "the source wants plaintext and the target does not; give --tls-dir to the source, or --insecure-plaintext to both"
        }
        (false, true) => {
            "the target wants plaintext and the source does not; give --tls-dir to the target, or --insecure-plaintext to both"
        }
        (true, true) | (false, false) => {
            "the two sides know no common cipher; install the same vmferry on both hosts"
        }
    };
    Err(AbortReason::new(AbortKind::Plaintext, sentence))
}

fn compare_guests(source: &GuestFacts, target: &GuestFacts) -> Result<(), AbortReason> {
    if source.kind != target.kind {
        return Err(refuse(&format!(
            "the source guest is a `{}` and the target guest is a `{}`; give both sides the same kind of --guest",
            source.kind, target.kind
        )));
    }
    for (key, ours) in source.facts.iter().filter(|(key, _)| !key.starts_with(NOTE_PREFIX)) {
        let Some(theirs) = target.facts.get(key) else { continue };
        if ours != theirs {
            return Err(refuse(&format!(
                "`{key}` is `{ours}` at the source and `{theirs}` at the target; start the target guest with `{ours}`"
            )));
        }
    }
    compare_layouts(&source.layout, &target.layout)
}

fn compare_layouts(source: &RamLayout, target: &RamLayout) -> Result<(), AbortReason> {
    let (source, target) = (source.blocks(), target.blocks());
    for (ours, theirs) in source.iter().zip(target) {
        compare_blocks(ours, theirs)?;
    }
    if let Some(extra) = source.get(target.len()) {
        return Err(refuse(&format!(
            "the source has a RAM block `{}` of {} that the target lacks; add the same memory backend there",
            extra.name,
            size(extra.len.0)
        )));
    }
    if let Some(extra) = target.get(source.len()) {
        return Err(refuse(&format!(
            "the target has a RAM block `{}` of {} that the source lacks; start the target without it",
            extra.name,
            size(extra.len.0)
        )));
    }
    Ok(())
}

fn compare_blocks(ours: &RamBlock, theirs: &RamBlock) -> Result<(), AbortReason> {
    if ours.name != theirs.name {
        return Err(refuse(&format!(
            "a RAM block is named `{}` at the source and `{}` at the target; give the memory backends the same ids in the same order",
            ours.name, theirs.name
        )));
    }
    if ours.len != theirs.len {
        return Err(refuse(&format!(
            "RAM block `{}` has {} at the source and {} at the target; start the target guest with {}",
            ours.name,
            size(ours.len.0),
            size(theirs.len.0),
            size(ours.len.0)
        )));
    }
    Ok(())
}

/// A size as QEMU's `-m` and `size=` take it.
fn size(bytes: u64) -> String {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    match bytes {
        _ if bytes % GIB == 0 && bytes > 0 => format!("{}G", bytes / GIB),
        _ if bytes % MIB == 0 && bytes > 0 => format!("{}M", bytes / MIB),
        _ if bytes % KIB == 0 && bytes > 0 => format!("{}K", bytes / KIB),
        _ => format!("{bytes} bytes"),
    }
}
