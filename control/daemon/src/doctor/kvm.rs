//! KVM: what the kernel offers to guests, and to whoever tracks their writes.

use kvm_ioctls::Kvm;

use super::host::Host;
use super::{Finding, Verdict, finding, read};

/// Capability numbers of `linux/kvm.h` that bear on a move.
const MANUAL_DIRTY_LOG_PROTECT2: u64 = 168;
const DIRTY_LOG_RING: u64 = 192;
const XSAVE2: u64 = 208;
const DIRTY_LOG_RING_ACQ_REL: u64 = 223;

pub(super) fn row(host: &Host) -> Finding {
    const PART: &str = "KVM";
    let path = host.dev("kvm");
    if !path.exists() {
        let why = if cpu_virtualizes() {
            "load kvm_intel or kvm_amd for more"
        } else {
            "this CPU shows neither vmx nor svm"
        };
        return finding(PART, Verdict::Without, "no /dev/kvm", format!("QEMU guests under TCG; {why}"));
    }
    match Kvm::new() {
        Ok(kvm) if kvm.get_api_version() == 12 => finding(
            PART,
            Verdict::Good,
            found(&kvm, host),
            "kvm: guests, tracked by the ring or the bitmap; qemu: guests under KVM, tracked from outside",
        ),
        Ok(kvm) => finding(
            PART,
            Verdict::Without,
            format!("api {}", kvm.get_api_version()),
            "only version 12 is spoken: guests under TCG only",
        ),
        Err(error) => finding(
            PART,
            Verdict::Without,
            format!("/dev/kvm does not open: {error}"),
            "guests under TCG only; run as root or join the group kvm",
        ),
    }
}

fn found(kvm: &Kvm, host: &Host) -> String {
    let has = |number: u64| kvm.check_extension_raw(number);
    let ring = has(DIRTY_LOG_RING).max(has(DIRTY_LOG_RING_ACQ_REL));
    let mut words = vec![format!("api {}", kvm.get_api_version())];
    words.push(if ring > 0 { format!("dirty ring of {} KiB", ring / 1024) } else { "no dirty ring".into() });
    words.push(
        if has(MANUAL_DIRTY_LOG_PROTECT2) > 0 { "dirty bitmap with clear" } else { "dirty bitmap" }.into(),
    );
    if has(XSAVE2) > 0 {
        words.push("xsave2".into());
    }
    words.push(nested(host));
    words.join(", ")
}

/// Whether guests may run guests, by the module's own parameter.
fn nested(host: &Host) -> String {
    let parameter = ["kvm_amd", "kvm_intel"]
        .into_iter()
        .find_map(|module| host.read(&format!("module/{module}/parameters/nested")));
    match parameter.as_deref() {
        Some("1" | "Y") => "nested on".into(),
        Some(_) => "nested off".into(),
        None => "nested unknown".into(),
    }
}

fn cpu_virtualizes() -> bool {
    let flags = read("/proc/cpuinfo").unwrap_or_default();
    flags
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| line.split(' ').any(|flag| flag == "vmx" || flag == "svm"))
}

#[cfg(test)]
mod tests {
    use super::super::host::tree::file;
    use super::*;

    #[test]
    fn a_host_without_kvm_runs_guests_under_tcg() {
        let folder = tempfile::tempdir().unwrap();
        let row = row(&Host::in_folder(folder.path()));
        assert_eq!((row.verdict, row.found.as_str()), (Verdict::Without, "no /dev/kvm"));
    }

    #[test]
    fn nesting_is_what_the_module_says() {
        for (word, said) in [("1", "nested on"), ("Y", "nested on"), ("0", "nested off"), ("N", "nested off")]
        {
            let folder = tempfile::tempdir().unwrap();
            file(folder.path(), "sys/module/kvm_amd/parameters/nested", word);
            assert_eq!(nested(&Host::in_folder(folder.path())), said);
        }
    }
}
