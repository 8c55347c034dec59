//! Two lab hosts see each other.

use vmferry_rig::lab::{Host, Place};

#[test]
fn the_hosts_meet() {
    let place = Place::find().unwrap();
    let (mine, theirs) = match place.host {
        Host::A => ("from a", "from b"),
        Host::B => ("from b", "from a"),
    };
    assert_eq!(place.meet("hello", mine).unwrap(), theirs);
    assert_eq!(place.meet("again", mine).unwrap(), theirs);
}
