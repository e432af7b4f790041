//! Runs every measurement in a process of its own, interleaved, and prints ratios.
//!
//! `bench run [--quick] [--only memory|amqp|mqtt] [--out FILE]` measures; `bench print FILE` prints the tables of a
//! results file again; `bench docs FILE PAGE` writes them between the marks of a page.

mod brokers;
mod measure;
mod plan;
mod report;
mod results;

use std::{path::PathBuf, process::exit};

use crate::{measure::Programs, results::Results};

/// What was asked for.
pub struct Choice {
    pub quick: bool,
    pub only: Option<String>,
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let rest: Vec<String> = arguments.collect();
    let outcome = match (command.as_str(), rest.as_slice()) {
        ("run", options) => run(options),
        ("print", [file]) => Results::read(file).map(|results| print!("{}", report::text(&results))),
        ("docs", [file, page]) => Results::read(file).and_then(|results| report::write_page(&results, page)),
        _ => Err("usage: bench run [--quick] [--only memory|amqp|mqtt] [--out FILE] | print FILE | docs FILE PAGE"
            .to_owned()),
    };
    if let Err(error) = outcome {
        eprintln!("bench: {error}");
        exit(1);
    }
}

fn run(options: &[String]) -> Result<(), String> {
    let mut choice = Choice { quick: false, only: None };
    let mut out = PathBuf::from("results/latest.json");
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let mut value = || options.next().cloned().ok_or(format!("{option} needs a value"));
        match option.as_str() {
            "--quick" => choice.quick = true,
            "--only" => choice.only = Some(value()?),
            "--out" => out = value()?.into(),
            _ => return Err(format!("unknown option {option}")),
        }
    }
    if let Some(only) = &choice.only
        && !["memory", "amqp", "mqtt"].contains(&only.as_str())
    {
        return Err(format!("--only {only}: there is memory, amqp and mqtt"));
    }
    let wanted = |part: &str| choice.only.as_deref().is_none_or(|only| only == part);
    let programs = Programs::beside_this()?;
    let mut results = Results::new(&choice);
    let mut failed = None;
    for part in ["memory", "amqp", "mqtt"].into_iter().filter(|part| wanted(part)) {
        let broker = match part {
            "amqp" => Some(brokers::Broker::start("rabbitmq")?),
            "mqtt" => Some(brokers::Broker::start("mosquitto")?),
            _ => None,
        };
        let address = broker.as_ref().map(brokers::Broker::url);
        for table in plan::tables(part, choice.quick) {
            eprintln!("measuring: {}", table.title);
            match measure::table(&programs, table, address.as_deref(), choice.quick) {
                Ok(table) => {
                    print!("{}", report::table_text(&table));
                    results.tables.push(table);
                }
                // What was measured before is kept.
                Err(error) => failed = Some(error),
            }
        }
    }
    results.write(&out)?;
    println!("\n{}", report::summary(&results));
    println!("written to {}", out.display());
    failed.map_or(Ok(()), Err)
}
