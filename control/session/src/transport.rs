//! What lanes travel over: offered by the source, decided by the target, never guessed.
//!
//! What must never happen: page bodies in clear on a wire because one side alone wanted it so.

use serde::{Deserialize, Serialize};

use crate::error::{AbortKind, AbortReason};

/// What lanes travel over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LaneTransport {
    /// TCP: what a side that says nothing means.
    #[default]
    Tcp,
    /// RDMA, every record through a ring, sealed as over TCP.
    RdmaSealed,
    /// RDMA, page bodies written straight into the target's guest and protected by the fabric alone.
    RdmaDirect,
    /// A word of a later version.
    #[serde(other)]
    Other,
}

impl LaneTransport {
    /// Whether nothing needs to be said about it: an older peer then reads what it always read.
    pub(crate) fn is_tcp(&self) -> bool {
        *self == LaneTransport::Tcp
    }

    /// Whether page bodies travel beside the records.
    #[must_use]
    pub fn is_direct(self) -> bool {
        self == LaneTransport::RdmaDirect
    }
}

/// What a list that was left out means.
pub(crate) fn only_tcp() -> Vec<LaneTransport> {
    vec![LaneTransport::Tcp]
}

/// Whether a list says no more than one that was left out.
pub(crate) fn is_only_tcp(offered: &[LaneTransport]) -> bool {
    offered == [LaneTransport::Tcp]
}

/// The first of the source's choices that the target takes.
pub(crate) fn first_common(
    source: &[LaneTransport],
    target: &[LaneTransport],
) -> Result<LaneTransport, AbortReason> {
    let known = |transport: &&LaneTransport| **transport != LaneTransport::Other;
    if let Some(transport) = source.iter().filter(known).find(|&transport| target.contains(transport)) {
        return Ok(*transport);
    }
    let has = |side: &[LaneTransport], transport| side.contains(&transport);
    let sentence = match (has(source, LaneTransport::RdmaDirect), has(target, LaneTransport::RdmaDirect)) {
        (true, false) if has(target, LaneTransport::RdmaSealed) => {
            "the source wants pages in clear over RDMA and the target does not; give --rdma-direct-plaintext to both sides or to neither"
        }
        (false, true) => {
            "the target wants pages in clear over RDMA and the source does not; give --rdma-direct-plaintext to both sides or to neither"
        }
        (true, _) | (false, false) => {
            "the source wants lanes over RDMA and the target does not listen for them; start it with --listen rdma://HOST:PORT, or send to tcp://, or give the source --rdma-fallback tcp"
        }
    };
    Err(AbortReason::new(AbortKind::Incompatible, sentence))
}

#[cfg(test)]
mod tests {
    use super::LaneTransport::{Other, RdmaDirect, RdmaSealed, Tcp};
    use super::*;

    #[test]
    fn the_sources_first_common_choice_wins() {
        assert_eq!(first_common(&[RdmaSealed, Tcp], &[RdmaSealed, Tcp]), Ok(RdmaSealed));
        assert_eq!(first_common(&[RdmaSealed, Tcp], &[Tcp]), Ok(Tcp));
        assert_eq!(first_common(&[RdmaDirect], &[RdmaDirect, Tcp]), Ok(RdmaDirect));
        assert_eq!(first_common(&[Tcp], &[RdmaDirect, Tcp]), Ok(Tcp));
    }

    #[test]
    fn clear_pages_need_both_sides_and_each_refusal_says_what_to_give() {
        for (source, target, word) in [
            (vec![RdmaDirect], vec![RdmaSealed, Tcp], "the source wants pages in clear"),
            (vec![RdmaSealed], vec![RdmaDirect, Tcp], "the target wants pages in clear"),
            (vec![RdmaSealed], vec![Tcp], "--listen rdma://"),
            (vec![RdmaDirect], vec![Tcp], "--listen rdma://"),
            (vec![Other], vec![Other, Tcp], "--listen rdma://"),
        ] {
            let refusal = first_common(&source, &target).unwrap_err().to_string();
            assert!(refusal.contains(word), "{source:?} {target:?}: {refusal}");
        }
    }

    #[test]
    fn tcp_alone_is_not_said() {
        assert!(is_only_tcp(&only_tcp()) && LaneTransport::default().is_tcp());
        assert!(!is_only_tcp(&[RdmaSealed, Tcp]) && RdmaDirect.is_direct() && !RdmaSealed.is_direct());
    }
}
