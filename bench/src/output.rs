//! Tables for people, one JSON object for programs: the same figures.

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use serde::Serialize;
use serde_json::{Map, Value};

/// Collects results; prints tables as they come and the JSON object last.
pub(crate) struct Output {
    json: bool,
    results: Map<String, Value>,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        let output = Self { json, results: Map::new() };
        if cfg!(debug_assertions) {
            output.say(
                "this is a debug build: its figures say nothing, use 'cargo run --release -p vmferry-bench'",
            );
        }
        output
    }

    /// What is going on, on stderr.
    pub(crate) fn say(&self, text: &str) {
        eprintln!("bench: {text}");
    }

    /// Prints a table.
    pub(crate) fn table(&self, title: &str, head: &[&str], rows: Vec<Vec<String>>) {
        if self.json {
            return;
        }
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(head);
        for row in rows {
            table.add_row(row);
        }
        println!("{title}\n{table}\n");
    }

    /// A line below a table.
    pub(crate) fn note(&self, text: &str) {
        if !self.json {
            println!("{text}");
        }
    }

    /// Keeps a result for the JSON object.
    pub(crate) fn keep(&mut self, key: &str, value: &impl Serialize) {
        self.results.insert(key.to_owned(), serde_json::to_value(value).unwrap_or(Value::Null));
    }

    /// Prints the JSON object where one was asked for.
    pub(crate) fn finish(&self) {
        if self.json {
            println!("{}", Value::Object(self.results.clone()));
        }
    }
}
