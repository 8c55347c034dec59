//! `vmferry doctor` on a lab host, which has all that it knows: every row must see it.

use vmferry::doctor::{Finding, Verdict, examine};

fn row<'a>(findings: &'a [Finding], part: &str) -> &'a Finding {
    findings.iter().find(|row| row.part == part).unwrap_or_else(|| panic!("no row {part}"))
}

#[track_caller]
fn assert_sees(findings: &[Finding], part: &str, words: &[&str]) {
    let row = row(findings, part);
    assert_eq!(row.verdict, Verdict::Good, "{row:?}");
    for word in words {
        assert!(row.found.contains(word), "`{word}` is missing in {row:?}");
    }
}

#[test]
fn the_doctor_sees_what_a_lab_host_has() {
    let findings = examine();
    for row in &findings {
        println!("lab: doctor: {}: {}", row.part, row.found);
    }
    assert_sees(
        &findings,
        "KVM",
        &["api 12", "dirty ring of 1024 KiB", "bitmap with clear", "xsave2", "nested"],
    );
    let vfio = row(&findings, "VFIO");
    assert_eq!(vfio.found.matches("8086:10ca, vfio-pci, group").count(), 2, "{vfio:?}");
    assert_sees(&findings, "VFIO", &["1b36:0010, vfio-pci", "1234:11e8, vfio-pci", "mdev mtty-2"]);
    assert!(vfio.consequence.contains("4 by plain vfio-pci cannot migrate"), "{vfio:?}");
    assert_sees(&findings, "SR-IOV", &["8086:10c9", "shows 2 of", "by vfio-pci"]);
    assert_sees(&findings, "RDMA", &["rxe0/1 on ve0: ACTIVE, Ethernet", "rxelan/1 on lan0: ACTIVE"]);
    assert_sees(&findings, "failover", &["net_failover is loaded"]);
    assert_eq!(row(&findings, "iommufd").found, "no /dev/iommu");
    assert!(findings.iter().all(|row| row.verdict != Verdict::Blocks), "{findings:?}");
}
