//! How a work request of an RDMA card ended, in the words of its manuals.
//!
//! An operator who reads "lost the link" can do nothing; one who reads "transport retry counter exceeded
//! (IBV_WC_RETRY_EXC_ERR)" looks at the cable, the switch and the peer. So the status travels in the error.

use std::fmt;

/// The status of a completion that is no success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CompletionStatus(pub u32);

impl CompletionStatus {
    /// Nothing went wrong.
    pub const SUCCESS: CompletionStatus = CompletionStatus(0);
    /// The request was thrown away, because its queue pair had ended before: never the cause, always a consequence.
    pub const FLUSHED: CompletionStatus = CompletionStatus(5);
    /// The peer's card did not acknowledge, as often as it was asked.
    pub const RETRY_EXCEEDED: CompletionStatus = CompletionStatus(12);
}

/// What libibverbs says and what its headers call it, in the order of the numbers.
const WORDS: [(&str, &str); 24] = [
    ("success", "IBV_WC_SUCCESS"),
    ("local length error", "IBV_WC_LOC_LEN_ERR"),
    ("local QP operation error", "IBV_WC_LOC_QP_OP_ERR"),
    ("local EE context operation error", "IBV_WC_LOC_EEC_OP_ERR"),
    ("local protection error", "IBV_WC_LOC_PROT_ERR"),
    ("work request flushed", "IBV_WC_WR_FLUSH_ERR"),
    ("memory window bind error", "IBV_WC_MW_BIND_ERR"),
    ("bad response", "IBV_WC_BAD_RESP_ERR"),
    ("local access error", "IBV_WC_LOC_ACCESS_ERR"),
    ("remote invalid request error", "IBV_WC_REM_INV_REQ_ERR"),
    ("remote access error", "IBV_WC_REM_ACCESS_ERR"),
    ("remote operation error", "IBV_WC_REM_OP_ERR"),
    ("transport retry counter exceeded", "IBV_WC_RETRY_EXC_ERR"),
    ("receiver-not-ready retry counter exceeded", "IBV_WC_RNR_RETRY_EXC_ERR"),
    ("local RDD violation error", "IBV_WC_LOC_RDD_VIOL_ERR"),
    ("remote invalid RD request", "IBV_WC_REM_INV_RD_REQ_ERR"),
    ("aborted by the peer", "IBV_WC_REM_ABORT_ERR"),
    ("invalid EE context number", "IBV_WC_INV_EECN_ERR"),
    ("invalid EE context state", "IBV_WC_INV_EEC_STATE_ERR"),
    ("fatal error", "IBV_WC_FATAL_ERR"),
    ("response timeout error", "IBV_WC_RESP_TIMEOUT_ERR"),
    ("general error", "IBV_WC_GENERAL_ERR"),
    ("tag matching error", "IBV_WC_TM_ERR"),
    ("tag matching rendezvous incomplete", "IBV_WC_TM_RNDV_INCOMPLETE"),
];

impl fmt::Display for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = usize::try_from(self.0).ok().and_then(|number| WORDS.get(number));
        match words {
            Some((sentence, name)) => write!(f, "{sentence} ({name})"),
            None => write!(f, "completion status {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_has_the_name_that_its_number_has_in_the_headers() {
        assert_eq!(
            CompletionStatus::RETRY_EXCEEDED.to_string(),
            "transport retry counter exceeded (IBV_WC_RETRY_EXC_ERR)"
        );
        assert_eq!(CompletionStatus::FLUSHED.to_string(), "work request flushed (IBV_WC_WR_FLUSH_ERR)");
        assert_eq!(CompletionStatus(10).to_string(), "remote access error (IBV_WC_REM_ACCESS_ERR)");
        assert_eq!(CompletionStatus(99).to_string(), "completion status 99");
    }
}
