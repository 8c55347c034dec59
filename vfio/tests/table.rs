//! The table of arcs as it is printed, every state against every arc, for every kind of device.
//!
//! `UPDATE_TABLES=1 cargo test -p vmferry-vfio --test table` writes `transitions/v2.txt` anew.

use std::path::Path;

use vmferry_vfio::Features;
use vmferry_vfio::state::print_table;

#[test]
fn the_table_is_the_printed_one() {
    let kinds = [(true, true), (true, false), (false, true), (false, false)];
    let seen: Vec<_> =
        kinds.into_iter().map(|(p2p, pre_copy)| print_table(Features { p2p, pre_copy })).collect();
    let seen = seen.join("\n");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transitions/v2.txt");
    if std::env::var_os("UPDATE_TABLES").is_some() {
        std::fs::write(&file, &seen).expect("the file beside this test can be written");
    }
    let kept = std::fs::read_to_string(&file).unwrap_or_default();
    let differs = seen.lines().zip(kept.lines()).position(|(seen, kept)| seen != kept);
    assert!(
        seen == kept,
        "v2.txt differs from line {differs:?}; look, then run with UPDATE_TABLES=1:\n{seen}"
    );
}
