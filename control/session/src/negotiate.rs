//! How a move is done: pure functions over what both sides offered.
//!
//! The newest common version wins, the source's order of preference decides, and everything that does not fit is
//! refused before the first page, in a sentence that holds the exact fix. What must never happen: a cipher that only
//! one side wanted to be weak.

use serde::{Deserialize, Serialize};
use vmferry_datapath::{RamBlock, RamLayout};

use crate::devices::{device_names, misfit};
use crate::error::{AbortKind, AbortReason, SessionError};
use crate::message::{AttemptId, GuestFacts, Offer};
use crate::transport::{self, LaneTransport};

/// The newest protocol version of this build.
pub const VERSION: u16 = 3;
/// All versions that this build speaks.
pub const VERSIONS: [u16; 3] = [1, VERSION_WITH_DEVICES, VERSION];
/// The oldest version in which devices have state streams of their own; else 2 is as 1 was.
pub const VERSION_WITH_DEVICES: u16 = 2;
/// The oldest version in which the source tells how old the state is; else 3 is as 2 was.
pub const VERSION_WITH_STATE_AGE: u16 = 3;
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
    /// What it takes lanes over.
    pub transports: Vec<LaneTransport>,
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
    /// What the lanes travel over.
    #[serde(default, skip_serializing_if = "LaneTransport::is_tcp")]
    pub transport: LaneTransport,
}

/// What a source offers for its guest: an older target may take one without devices.
pub fn versions_for(guest: &GuestFacts) -> Vec<u16> {
    let oldest = if device_names(guest).is_empty() { 1 } else { VERSION_WITH_DEVICES };
    VERSIONS.into_iter().filter(|version| *version >= oldest).collect()
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
    let transport = transport::first_common(&offer.transports, &terms.transports)?;
    // What is written straight into the guest cannot be packed first.
    let known = |mode: &&CompressionMode| **mode != CompressionMode::Other && !transport.is_direct();
    let common = offer.compressions.iter().filter(known).find(|&mode| terms.compressions.contains(mode));
    Ok(Agreement {
        attempt: offer.attempt,
        version,
        cipher,
        compression: common.copied().unwrap_or(CompressionMode::Off),
        lanes,
        verify: offer.verify,
        transport,
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
        (!offer.transports.contains(&answer.transport), "its answer names lanes that were not offered"),
        (
            answer.transport.is_direct() && answer.compression != CompressionMode::Off,
            "its answer packs pages that are written straight into the guest",
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
    if let Some(sentence) = misfit(source, target) {
        return Err(refuse(&sentence));
    }
    let compared = source.facts.iter().filter(|(key, _)| !key.starts_with(NOTE_PREFIX));
    let pairs = compared.filter_map(|(key, ours)| target.facts.get(key).map(|theirs| (key, ours, theirs)));
    // The shortest first: where the number of CPUs differs, so do a hundred of their features, and they are no help.
    let differing = pairs.filter(|(_, ours, theirs)| ours != theirs).min_by_key(|(_, ours, _)| ours.len());
    if let Some((key, ours, theirs)) = differing {
        let (ours, theirs) = words_that_differ(ours, theirs);
        return Err(refuse(&format!(
            "`{key}` is `{ours}` at the source and `{theirs}` at the target; start the target guest with `{ours}`"
        )));
    }
    compare_layouts(&source.layout, &target.layout)
}

/// Of two long lists of words, those that are not in both; anything else as it is.
fn words_that_differ(ours: &str, theirs: &str) -> (String, String) {
    /// Past it, a sentence that holds both lists cannot be read.
    const READABLE_BYTES: usize = 80;
    if ours.len().max(theirs.len()) <= READABLE_BYTES {
        return (ours.to_owned(), theirs.to_owned());
    }
    let only = |this: &str, that: &str| {
        let other: Vec<&str> = that.split(' ').collect();
        this.split(' ').filter(|word| !other.contains(word)).collect::<Vec<_>>().join(" ")
    };
    (only(ours, theirs), only(theirs, ours))
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
        _ if bytes > 0 && bytes.is_multiple_of(GIB) => format!("{}G", bytes / GIB),
        _ if bytes > 0 && bytes.is_multiple_of(MIB) => format!("{}M", bytes / MIB),
        _ if bytes > 0 && bytes.is_multiple_of(KIB) => format!("{}K", bytes / KIB),
        _ => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use vmferry_datapath::ByteLen;

    use super::*;

    fn guest(blocks: &[(&str, u64)], facts: &[(&str, &str)]) -> GuestFacts {
        let block = |(name, mib): &(&str, u64)| RamBlock {
            name: (*name).into(),
            len: ByteLen(mib << 20),
            page_bytes: 4096,
        };
        let facts: BTreeMap<_, _> = facts.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let layout = RamLayout::new(blocks.iter().map(block).collect()).unwrap();
        GuestFacts { kind: "qemu".into(), name: "a".into(), facts, layout }
    }

    fn offer() -> Offer {
        Offer {
            transports: vec![LaneTransport::Tcp],
            attempt: AttemptId::from_bytes([1; 16]),
            versions: vec![1, 2],
            ciphers: vec![CipherSuite::Aes256Gcm],
            compressions: vec![CompressionMode::Zstd, CompressionMode::Off],
            lanes: 200,
            verify: true,
            guest: guest(&[("m0", 512), ("m1", 1024)], &[("machine", "pc-q35-10.0"), ("note-vmm", "10.0.2")]),
        }
    }

    fn terms() -> TargetTerms {
        TargetTerms {
            transports: vec![LaneTransport::Tcp],
            versions: vec![1, 2, 3],
            ciphers: vec![CipherSuite::Aes256Gcm],
            compressions: vec![CompressionMode::Off, CompressionMode::Zstd],
            lanes_max: 128,
            guest: guest(&[("m0", 512), ("m1", 1024)], &[("machine", "pc-q35-10.0"), ("note-vmm", "10.1.0")]),
        }
    }

    #[test]
    fn the_newest_version_and_the_sources_preference_win() {
        let agreement = negotiate(&offer(), &terms()).unwrap();
        assert_eq!((agreement.version, agreement.lanes, agreement.verify), (2, LANES_MAX, true));
        assert_eq!(agreement.compression, CompressionMode::Zstd);
        assert_eq!(check_answer(&offer(), &agreement), Ok(()));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_fix() {
        type Change = fn(&mut Offer, &mut TargetTerms);
        let refusals: [(Change, &str); 9] = [
            (
                |_, t| t.versions = vec![7],
                "the source speaks protocol version 1, 2 and the target 7; install the same vmferry on both hosts",
            ),
            (
                |o, _| o.ciphers = vec![CipherSuite::Plaintext],
                "the source wants plaintext and the target does not; give --tls-dir to the source, or --insecure-plaintext to both",
            ),
            (
                |_, t| t.ciphers = vec![CipherSuite::Plaintext],
                "the target wants plaintext and the source does not; give --tls-dir to the target, or --insecure-plaintext to both",
            ),
            (|o, _| o.lanes = 0, "the source offered no lane; give --lanes 1 or more there"),
            (
                |_, t| t.guest.kind = "process".into(),
                "the source guest is a `qemu` and the target guest is a `process`; give both sides the same kind of --guest",
            ),
            (
                |_, t| t.guest.facts = BTreeMap::from([("machine".into(), "pc-i440fx-10.0".into())]),
                "`machine` is `pc-q35-10.0` at the source and `pc-i440fx-10.0` at the target; start the target guest with `pc-q35-10.0`",
            ),
            (
                |_, t| t.guest = guest(&[("m0", 512), ("m1", 2048)], &[]),
                "RAM block `m1` has 1G at the source and 2G at the target; start the target guest with 1G",
            ),
            (
                |_, t| t.guest = guest(&[("m0", 512), ("x", 1024)], &[]),
                "a RAM block is named `m1` at the source and `x` at the target; give the memory backends the same ids in the same order",
            ),
            (
                |_, t| t.guest = guest(&[("m0", 512)], &[]),
                "the source has a RAM block `m1` of 1G that the target lacks; add the same memory backend there",
            ),
        ];
        for (change, sentence) in refusals {
            let (mut offer, mut terms) = (offer(), terms());
            change(&mut offer, &mut terms);
            assert_eq!(negotiate(&offer, &terms).unwrap_err().sentence(), sentence);
        }
    }

    #[test]
    fn an_unknown_cipher_on_both_sides_is_no_common_cipher() {
        let (mut offer, mut terms) = (offer(), terms());
        offer.ciphers = vec![CipherSuite::Other];
        terms.ciphers = vec![CipherSuite::Other];
        assert_eq!(negotiate(&offer, &terms).unwrap_err().kind(), AbortKind::Plaintext);
    }

    #[test]
    fn a_target_cannot_talk_the_source_down() {
        type Change = fn(&mut Agreement);
        let lies: [Change; 6] = [
            |a| a.cipher = CipherSuite::Plaintext,
            |a| a.version = 9,
            |a| a.lanes = 0,
            |a| a.lanes = 65,
            |a| a.verify = false,
            |a| a.attempt = AttemptId::from_bytes([2; 16]),
        ];
        for lie in lies {
            let mut agreement = negotiate(&offer(), &terms()).unwrap();
            lie(&mut agreement);
            assert!(matches!(check_answer(&offer(), &agreement), Err(SessionError::PeerMisbehaved(_))));
        }
    }
}
