//! Books, logs that fail, and sentences.

use super::*;
use crate::fake::FakeLog;

fn maps(ranges: &[(u64, u64)]) -> DmaMaps {
    let mut maps = DmaMaps::default();
    for (page, pages) in ranges {
        maps.add(IovaRange { iova: page * PAGE_BYTES, len: pages * PAGE_BYTES }).unwrap();
    }
    maps
}

#[test]
fn a_book_takes_whole_pages_that_nobody_has() {
    let mut book = maps(&[(16, 4), (0, 2)]);
    assert_eq!(book.ranges()[0].iova, 0);
    assert_eq!(book.bytes(), 6 * PAGE_BYTES);
    for (iova, len) in [(1, PAGE_BYTES), (0x8000, 1), (0x8000, 0), (19 * PAGE_BYTES, PAGE_BYTES)] {
        assert!(matches!(book.add(IovaRange { iova, len }), Err(VfioError::Bug(_))), "{iova:#x} {len:#x}");
    }
    let last = IovaRange { iova: u64::MAX - PAGE_BYTES + 1, len: PAGE_BYTES };
    assert!(book.add(last).is_err(), "a map that ends behind the last address");
    assert!(book.remove(IovaRange { iova: 0, len: PAGE_BYTES }).is_err(), "half a map is none");
    book.remove(IovaRange { iova: 0, len: 2 * PAGE_BYTES }).unwrap();
    assert_eq!(book.ranges().len(), 1);
}

#[test]
fn a_log_tells_runs_once() {
    let fake = FakeLog::default();
    let mut log = WatchedLog::start(fake.clone(), maps(&[(0, 100), (200, 3)])).unwrap();
    for page in [0, 62, 63, 64, 99, 201] {
        fake.write(page * PAGE_BYTES);
    }
    let page = |first: u64, pages: u64| IovaRange { iova: first * PAGE_BYTES, len: pages * PAGE_BYTES };
    let runs = vec![page(0, 1), page(62, 3), page(99, 1), page(201, 1)];
    assert_eq!(log.collect(), Dirty::Ranges(runs));
    assert_eq!(log.collect(), Dirty::Ranges(vec![]));
    assert!(!log.knows_only_maps());
    log.stop().unwrap();
    assert!(!fake.is_on());
}

#[test]
fn a_log_that_failed_calls_everything_dirty_until_it_is_started_anew() {
    let fake = FakeLog::default();
    let book = maps(&[(0, 4), (8, 4)]);
    let mut log = WatchedLog::start(fake.clone(), book.clone()).unwrap();
    fake.write(0);
    fake.fail_report(1);
    let dirty = log.collect();
    assert!(matches!(&dirty, Dirty::Everything(why) if why.contains("report of DMA")), "{dirty:?}");
    assert_eq!(dirty.ranges(&book), book.ranges(), "the first map's report is lost with the second's");
    assert!(matches!(log.collect(), Dirty::Everything(_)), "it lost count");
    let mut again = WatchedLog::start(fake.clone(), book.clone()).unwrap();
    assert_eq!(again.collect(), Dirty::Ranges(vec![]));
    fake.shorten_reports();
    assert!(matches!(again.collect(), Dirty::Everything(_)), "a report that is too short tells nothing");
}

#[test]
fn a_log_that_does_not_start_is_an_error_and_one_that_knows_only_maps_is_found_out() {
    let fake = FakeLog::default();
    fake.fail_start();
    assert!(WatchedLog::start(fake, maps(&[(0, 1)])).is_err());
    let simple = FakeLog::default();
    simple.call_everything_dirty();
    let log = WatchedLog::start(simple, maps(&[(0, 65)])).unwrap();
    assert!(log.knows_only_maps());
    let empty = WatchedLog::start(FakeLog::default(), DmaMaps::default()).unwrap();
    assert!(!empty.knows_only_maps());
}

#[test]
fn pins_are_told_in_the_operators_words() {
    let pins = Pins { device: "eth1".into(), kind: "VF".into(), bytes: 512 << 20 };
    let rate = RateInterval { low: 3.46e9, high: 3.83e9 };
    assert_eq!(pins.sentence(rate), "eth1 VF pins 512 MiB: adds 140 to 155 ms");
    let none = RateInterval { low: 0.0, high: 1e9 };
    assert_eq!(pins.adds_ms(none).1, f64::INFINITY);
    assert!(pins.sentence(none).contains("no rate is known yet"));
}

#[test]
fn the_best_log_is_taken_and_without_one_everything_is_pinned() {
    let book = maps(&[(0, 8)]);
    let (good, broken, simple) = (FakeLog::default(), FakeLog::default(), FakeLog::default());
    broken.fail_start();
    simple.call_everything_dirty();
    let log = |fake: &FakeLog| Some(Box::new(fake.clone()) as Box<dyn DmaLog>);
    let best = |device, iommu| Watch::best(device, iommu, book.clone());
    assert_eq!(best(log(&good), log(&simple)).teller(), Teller::Device);
    let mut watch = best(log(&broken), log(&good));
    assert_eq!((watch.teller(), watch.pinned()), (Teller::Iommu, &[][..]));
    good.write(PAGE_BYTES);
    assert_eq!(watch.collect().bytes(&book), PAGE_BYTES);
    let watch = best(log(&broken), log(&simple));
    assert_eq!(watch.pinned(), book.ranges());
    let Watch::Nobody { why, .. } = &watch else { panic!("it trusted a log") };
    assert!(why.contains("does not start") && why.contains("always"), "{why}");
    assert!(!simple.is_on(), "a log that is not used is stopped");
    assert_eq!(best(None, None).pinned(), book.ranges());
}
