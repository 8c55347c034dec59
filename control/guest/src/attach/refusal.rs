//! The sentences for what stands in the way of tracking a process, each with its fix.

use std::fs;
use std::io;

use super::inject::InjectFault;
use super::writers::process_name;
use crate::GuestError;

/// Turns a failed injection into words for the operator.
pub(crate) fn explain(process: i32, fault: InjectFault) -> GuestError {
    let name = process_name(process);
    match fault {
        InjectFault::NotPermitted(errno) => GuestError::HostRefused {
            what: not_permitted(process, &name, errno),
            source: io::Error::from_raw_os_error(errno),
        },
        InjectFault::Gone => GuestError::misbehaved(format!("{name} ended while it was attached to")),
        InjectFault::Stuck => GuestError::misbehaved(format!(
            "no thread of {name} could be stopped within seconds; look whether it hangs in a dead disk or network \
             (state D in ps), then try again"
        )),
        InjectFault::Unsupported(what, errno) => GuestError::HostRefused {
            what: format!(
                "{what} is refused inside {name}; allow it in the seccomp profile of its container, or start the VMM \
                 without a system call filter (QEMU: -sandbox off, libvirt: seccomp_sandbox = 0 in qemu.conf)"
            ),
            source: io::Error::from_raw_os_error(errno),
        },
        InjectFault::Register(address, libc::EBUSY) => GuestError::mistake(format!(
            "the memory of {name} at {address:#x} already belongs to another userfaultfd (another vmferry, or \
             post-copy); end that one first"
        )),
        InjectFault::Register(address, errno) => GuestError::HostRefused {
            what: format!(
                "the memory of {name} at {address:#x} cannot be write-protected; update the kernel to 6.7 or newer"
            ),
            source: io::Error::from_raw_os_error(errno),
        },
        InjectFault::Other(why) => GuestError::misbehaved(format!("{name} cannot be tracked: {why}")),
    }
}

fn not_permitted(process: i32, name: &str, errno: i32) -> String {
    if let Some(tracer) = tracer_of(process) {
        return format!("{name} is already traced by {}; detach that debugger first", process_name(tracer));
    }
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    if scope.trim() == "3" {
        return format!(
            "no process may be traced on this host: kernel.yama.ptrace_scope is 3 and stays so until a reboot; boot \
             with 2 or less to attach to {name}"
        );
    }
    let yama = match scope.trim() {
        "1" | "2" => ", or sysctl kernel.yama.ptrace_scope=0 when it runs as the same user",
        _ => "",
    };
    let filter = match errno {
        libc::EACCES => {
            "; if you are root already, look for a security module (AppArmor, SELinux) that denies ptrace"
        }
        _ => "",
    };
    format!(
        "vmferry may not trace {name}; run it as root, or give it the capability: setcap cap_sys_ptrace+ep \
         /path/of/vmferry{yama}{filter}"
    )
}

/// The process that traces this one.
fn tracer_of(process: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?.trim().parse().ok()?;
    (tracer != 0).then_some(tracer)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::sys::ptrace;
    use nix::unistd::Pid;

    use super::super::helper::inject_apart;
    use super::*;

    #[test]
    fn a_process_under_a_debugger_is_refused_with_the_debuggers_name() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        ptrace::seize(Pid::from_raw(pid), ptrace::Options::empty()).unwrap();
        let fault = inject_apart(pid, &[]).unwrap_err();
        let sentence = explain(pid, fault).to_string();
        assert!(
            sentence.contains("already traced by") && sentence.contains("detach that debugger"),
            "{sentence}"
        );
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn every_refusal_says_what_to_do() {
        let me = i32::try_from(std::process::id()).unwrap();
        for (fault, fix) in [
            (InjectFault::NotPermitted(libc::EPERM), "cap_sys_ptrace"),
            (InjectFault::Unsupported("userfaultfd".into(), libc::EPERM), "-sandbox off"),
            (InjectFault::Register(0x1000, libc::EBUSY), "another userfaultfd"),
            (InjectFault::Stuck, "try again"),
        ] {
            let sentence = explain(me, fault).to_string();
            assert!(sentence.contains(fix), "{sentence}");
        }
    }
}
