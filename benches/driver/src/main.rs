//! Runs every measurement in a process of its own, interleaved, and prints ratios.
//!
//! `bench run [--quick] [--out FILE] NAME...` measures what the programs `bench-NAME` beside this one say that they
//! measure; `bench print FILE...` prints the tables of results files again; `bench docs PAGE FILE...` writes them in
//! their places between the marks of a page.

mod measure;
mod report;
mod results;

use std::{path::PathBuf, process::exit};

use crate::{measure::Program, results::Results};

const USAGE: &str = "usage: bench run [--quick] [--out FILE] NAME... | print FILE... | docs PAGE FILE...";

fn main() {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let rest: Vec<String> = arguments.collect();
    let outcome = match (command.as_str(), rest.as_slice()) {
        ("run", options) => run(options),
        ("print", files) => Results::read_all(files).map(|results| print!("{}", report::text(&results))),
        ("docs", [page, files @ ..]) => files
            .iter()
            .map(|file| Results::read(file))
            .collect::<Result<Vec<_>, _>>()
            .and_then(|files| report::write_page(&files, page)),
        _ => Err(USAGE.to_owned()),
    };
    if let Err(error) = outcome {
        eprintln!("bench: {error}");
        exit(1);
    }
}

fn run(options: &[String]) -> Result<(), String> {
    let (mut quick, mut out, mut names) = (false, PathBuf::from("results/latest.json"), Vec::new());
    let mut options = options.iter();
    while let Some(option) = options.next() {
        match option.as_str() {
            "--quick" => quick = true,
            "--out" => out = options.next().ok_or("--out needs a value")?.into(),
            option if option.starts_with('-') => return Err(format!("unknown option {option}; {USAGE}")),
            name => names.push(name),
        }
    }
    let programs: Vec<Program> = names.iter().map(|name| Program::open(name, quick)).collect::<Result<_, _>>()?;
    let mut results = Results::new(quick);
    let mut failed = Vec::new();
    for program in programs {
        let brokers = program.start_brokers()?;
        for table in &program.plan.tables {
            eprintln!("measuring: {}", table.title);
            match measure::table(&program, table, &brokers, quick) {
                Ok(table) => {
                    print!("{}", report::table_text(&table));
                    results.tables.push(table);
                }
                // What was measured before is kept.
                Err(error) => {
                    eprintln!("\n{}: {error}", table.title);
                    failed.push(error);
                }
            }
        }
    }
    results.write(&out)?;
    println!("\n{}", report::summary(&results));
    println!("written to {}", out.display());
    if failed.is_empty() { Ok(()) } else { Err(format!("{} tables are missing: {}", failed.len(), failed.join("; "))) }
}
