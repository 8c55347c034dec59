//! Prints what one lane does on this machine, beside the raw cost of its parts.
use std::sync::Arc;
use vmferry_datapath::probe::{self, Cpus, Measured};
use vmferry_datapath::*;

fn ram(mib: u64) -> Arc<GuestRam> {
    let block = RamBlock { name: "ram".into(), len: ByteLen(mib << 20), page_bytes: 4096 };
    let layout = RamLayout::new(vec![block]).expect("a layout");
    let file = tempfile::tempfile_in("/dev/shm").expect("a file");
    file.set_len(mib << 20).expect("its length");
    let ram = GuestRam::map(layout, vec![RamFile { file, offset: 0 }], Access::ReadWrite).expect("a map");
    for page in 0..mib * 256 {
        let mut bytes = [0_u8; PAGE_BYTES];
        bytes.fill(u8::try_from(page % 255 + 1).expect("a byte"));
        ram.write_page(PageIndex(page), &bytes).expect("a write");
    }
    Arc::new(ram)
}

fn main() {
    let (source, target) = (ram(512), ram(512));
    let (best, rates) = fastest_provider();
    println!("{best} of {rates:?}");
    let sealed = Cipher::Aes256Gcm(best);
    let cpus = Cpus { sender: Some(0), receiver: Some(1) };
    let show = |name: &str, measured: Result<Measured, DataError>| {
        let measured = measured.expect("a measurement");
        print!("{name} {:.2} ({:.0})  ", measured.gb_per_s(), 1000.0 * measured.cpu_s_per_gib());
    };
    let only = std::env::args().nth(1);
    for _ in 0..std::env::args().nth(2).map_or(4, |n| n.parse().expect("a number")) {
        let run = |name: &str, work: &dyn Fn() -> Result<Measured, DataError>| {
            if only.as_deref().is_none_or(|only| only == name || only == "all") {
                show(name, work());
            }
        };
        run("scan", &|| probe::scan(&source));
        run("seal_hot", &|| probe::seal_hot(512 << 20, sealed));
        run("seal", &|| probe::seal(&source, sealed));
        run("page", &|| probe::page(&source, sealed));
        run("copy", &|| probe::page(&source, Cipher::Plain));
        run("bare64k", &|| probe::bare(1 << 30, 64 << 10, cpus));
        run("bare", &|| probe::bare(1 << 30, 256 << 10, cpus));
        run("lane_plain", &|| probe::lane(&source, &target, Cipher::Plain, cpus));
        run("fresh_plain", &|| {
            target.discard_all().expect("a discard");
            probe::lane(&source, &target, Cipher::Plain, cpus)
        });
        run("round_trips", &|| probe::round_trips(2000, sealed, cpus));
        run("lane_sealed", &|| probe::lane(&source, &target, sealed, cpus));
        println!();
    }
}
