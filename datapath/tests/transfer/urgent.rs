//! Urgent pages beside the lanes, over memory: each page by one path, and none older over a newer one.

use std::sync::Arc;

use vmferry_datapath::*;

use crate::world::*;

const PAGES: u64 = 64 * 24 + 9;

#[test]
fn each_page_arrives_once_and_as_it_was_when_the_guest_stopped() {
    let (source, target) = (empty_ram(&[PAGES]), empty_ram(&[PAGES]));
    fill(&source, 3);
    let (near, far) = over_memory(SEALED, 2);
    let (mut receiver, _state) = Receiver::start(Arc::clone(&target), far, SEALED).unwrap();
    let mut sender = Sender::start(Arc::clone(&source), near, plan(SEALED)).unwrap();
    send_everything(&mut sender, &source);
    // The guest went on writing, zeroes among it, and is paused now.
    let mut dirty = PageSet::new(source.layout());
    for page in (0..PAGES).step_by(3) {
        let bytes = if page % 2 == 0 { [0; PAGE_BYTES] } else { noise_page(page | 1 << 40) };
        source.write_page(PageIndex(page), &bytes).unwrap();
        dirty.insert_range(PageIndex(page), PageCount(1));
    }
    let (near, far) = over_memory(SEALED, 1);
    let mut urgent_receiver = receiver.open_urgent(far.into_iter().next().unwrap()).unwrap();
    let mut urgent = sender.open_urgent(near.into_iter().next().unwrap()).unwrap();
    let sent = std::thread::scope(|scope| {
        let bulk = scope.spawn(|| sender.send_rest(&dirty, &mut yes()).unwrap());
        let wanted = (0..PAGES).rev().filter(|page| page % 3 == 0).map(PageIndex);
        let sent = wanted.filter(|page| urgent.send(*page).unwrap()).count() as u64;
        assert!(bulk.join().unwrap());
        sent
    });
    let (rest, totals) = (sender.finish().unwrap(), urgent.finish().unwrap());
    assert!(receiver.wait_complete(&rest, &mut yes()).unwrap());
    assert!(urgent_receiver.wait_complete(&totals, &mut yes()).unwrap());
    assert_same(&source, &target);
    let on_the_path = urgent.meter();
    assert_eq!(on_the_path.data_pages + on_the_path.zero_pages, sent);
    assert_eq!((urgent.failure(), sender.failure(), receiver.failure()), (None, None, None));
}

#[test]
fn what_would_break_the_order_is_refused() {
    let (source, target) = (empty_ram(&[64]), empty_ram(&[64]));
    let (near, far) = over_memory(SEALED, 1);
    let (receiver, _state) = Receiver::start(target, far, SEALED).unwrap();
    let mut sender = Sender::start(Arc::clone(&source), near, plan(SEALED)).unwrap();
    let all = PageSet::full(source.layout());
    assert!(sender.send_rest(&all, &mut yes()).is_err(), "there is no urgent path yet");
    let (near, far) = over_memory(SEALED, 1);
    let _urgent_receiver = receiver.open_urgent(far.into_iter().next().unwrap()).unwrap();
    let mut urgent = sender.open_urgent(near.into_iter().next().unwrap()).unwrap();
    assert!(sender.send(&all, &mut yes()).is_err() && sender.send_zero(&all).is_err());
    assert!(urgent.send(PageIndex(64)).is_err(), "the guest has no such page");
}
