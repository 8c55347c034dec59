//! Which guest: `qemu:/run/a.qmp`, `kvm:NAME` or `process:NAME`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::GuestError;

/// The name an operator gives a guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GuestSpec {
    /// A QEMU, by the path of its QMP socket.
    Qemu {
        /// The UNIX socket that QEMU's `-qmp` or `-mon` option opened.
        qmp: PathBuf,
    },
    /// A micro-VM, by its name.
    Kvm {
        /// The name it was started under.
        name: String,
    },
    /// An embedded workload process, by its name.
    Process {
        /// The name it was started under.
        name: String,
    },
}

impl FromStr for GuestSpec {
    type Err = GuestError;

    fn from_str(text: &str) -> Result<GuestSpec, GuestError> {
        match text.split_once(':') {
            Some(("qemu", path)) if !path.is_empty() => Ok(GuestSpec::Qemu { qmp: PathBuf::from(path) }),
            Some(("process", name)) if !name.is_empty() && !name.contains('/') => {
                Ok(GuestSpec::Process { name: name.to_owned() })
            }
            Some(("kvm", name)) if !name.is_empty() && !name.contains('/') => {
                Ok(GuestSpec::Kvm { name: name.to_owned() })
            }
            _ => Err(GuestError::mistake(format!(
                "`{text}` names no guest; write qemu:/path/of/its/qmp.sock, kvm:NAME or process:NAME"
            ))),
        }
    }
}

impl fmt::Display for GuestSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestSpec::Qemu { qmp } => write!(f, "qemu:{}", qmp.display()),
            GuestSpec::Kvm { name } => write!(f, "kvm:{name}"),
            GuestSpec::Process { name } => write!(f, "process:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_reads_back_what_it_prints() {
        for text in ["qemu:/run/a.qmp", "process:db-1", "kvm:web-2", "qemu:relative/with:colon"] {
            assert_eq!(text.parse::<GuestSpec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn anything_else_is_refused_with_the_forms_that_work() {
        for text in ["", "qemu:", "kvm:", "kvm:a/b", "process:", "process:a/b", "/run/a.qmp", "xen:7"] {
            let sentence = text.parse::<GuestSpec>().unwrap_err().to_string();
            assert!(sentence.contains("qemu:/path") && sentence.contains("process:NAME"), "{sentence}");
        }
    }
}
