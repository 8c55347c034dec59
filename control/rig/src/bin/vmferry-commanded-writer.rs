//! Writes the pages that its input names, and nothing else of the file that it maps.
//!
//! `vmferry-commanded-writer FILE` writes every page once and says `done`; then for each line of page numbers it writes
//! those pages and says `done` again.

use std::fs::OpenOptions;

use vmferry_workload::{MappedPages, PageMemory};

type Failure = Box<dyn std::error::Error>;

const PAGE_BYTES: u64 = 4096;

fn main() -> Result<(), Failure> {
    let file = std::env::args().nth(1).ok_or("usage: vmferry-commanded-writer FILE")?;
    let file = OpenOptions::new().read(true).write(true).open(file)?;
    let pages = file.metadata()?.len() / PAGE_BYTES;
    let mut memory = MappedPages::shared(&file, 0, usize::try_from(pages)?)?;
    let mut write = |page| {
        let count = memory.load(page, 0) + 1;
        memory.store(page, 0, count);
    };
    (0..pages).for_each(&mut write);
    println!("done");
    for line in std::io::stdin().lines() {
        for page in line?.split_whitespace() {
            let page = page.parse::<u64>()?;
            if page >= pages {
                return Err(format!("the file has {pages} pages, and {page} is none of them").into());
            }
            write(page);
        }
        println!("done");
    }
    Ok(())
}
