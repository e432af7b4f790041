//! What the documentation says about settings, capabilities and the command line is what the code says.
//!
//! `UPDATE_DOCS=1 cargo test -p polymq-cli --all-features --test docs` writes it anew.
#![cfg(all(feature = "amqp", feature = "http", feature = "kafka", feature = "mqtt", feature = "sqs"))]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use polymq::{Backend, Registry};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every page of the documentation.
fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<_> = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|name| root().join(name)).to_vec();
    let mut folders = vec![root().join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "md") {
                pages.push(path);
            }
        }
    }
    pages
}

#[test]
fn generated_parts_are_up_to_date() {
    let registry = Registry::linked();
    let update = std::env::var_os("UPDATE_DOCS").is_some();
    let (mut seen, mut stale) = (Vec::new(), Vec::new());
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        let mut fresh = String::new();
        let mut rest = text.as_str();
        while let Some(at) = rest.find("<!-- generated: ") {
            let (before, marked) = rest.split_at(at);
            let (mark, after) = marked.split_once(" -->\n").expect("the mark ends with its line");
            let what = mark.trim_start_matches("<!-- generated: ");
            let end = after.find("<!-- end -->").unwrap_or_else(|| panic!("{what} has no end in {}", page.display()));
            fresh += &format!("{before}{mark} -->\n{}", generate(what, &registry));
            rest = &after[end..];
            seen.push(what.to_owned());
        }
        fresh += rest;
        if fresh != text {
            if update {
                fs::write(&page, fresh).unwrap();
            } else {
                stale.push(page);
            }
        }
    }
    assert!(stale.is_empty(), "run UPDATE_DOCS=1 cargo test -p polymq-cli --all-features --test docs: {stale:?}");
    for backend in registry.names() {
        for what in ["settings", "capabilities"] {
            let wanted = format!("{what} {backend}");
            assert!(seen.contains(&wanted), "no page has <!-- generated: {wanted} -->");
        }
    }
}

fn generate(what: &str, registry: &Registry) -> String {
    match what.split_once(' ') {
        Some(("settings", name)) => settings(registry.backend(name).unwrap().as_ref()),
        Some(("capabilities", name)) => capabilities(&[registry.backend(name).unwrap().as_ref()]),
        None if what == "capabilities" => capabilities(&registry.iter().map(AsRef::as_ref).collect::<Vec<_>>()),
        None if what == "variables" => variables(registry),
        None if what == "help" => help(),
        None if what == "cases" => cases(),
        _ => panic!("nothing generates {what:?}"),
    }
}

fn settings(backend: &dyn Backend) -> String {
    let upper = backend.name().to_uppercase();
    let mut table = format!("| setting (`POLYMQ_{upper}_<SETTING>`) | default | meaning |\n|---|---|---|\n");
    for key in backend.keys() {
        let default = if key.default.is_empty() { "none".to_owned() } else { format!("`{}`", key.default) };
        table += &format!("| `{}` | {default} | {} |\n", key.name, key.help.replace('|', "\\|"));
    }
    table
}

fn capabilities(backends: &[&dyn Backend]) -> String {
    let names = backends.iter().map(|backend| format!(" {} |", backend.name())).collect::<String>();
    let mut table = format!("| |{names}\n|---|{}\n", "---|".repeat(backends.len()));
    let columns: Vec<_> = backends.iter().map(|backend| backend.capabilities().table()).collect();
    for (at, (name, _)) in columns[0].iter().enumerate() {
        let words = columns.iter().map(|column| format!(" {} |", column[at].1)).collect::<String>();
        table += &format!("| {} |{words}\n", name.replace('_', " "));
    }
    table
}

fn variables(registry: &Registry) -> String {
    let mut table = "| variable | sets |\n|---|---|\n".to_owned();
    for backend in registry.iter() {
        for (variable, key) in backend.foreign_variables() {
            table += &format!("| `{variable}` | `{key}` of {} |\n", backend.name());
        }
    }
    table
}

fn help() -> String {
    let mut text = String::new();
    for command in [
        "",
        "backends",
        "send",
        "consume",
        "check",
        "dead-letters",
        "dead-letters list",
        "dead-letters replay",
        "channels",
        "peek",
        "purge",
        "topology",
        "topology plan",
        "topology apply",
        "delete",
        "broker",
    ] {
        let mut arguments: Vec<_> = command.split_whitespace().collect();
        arguments.push("--help");
        let output = Command::new(env!("CARGO_BIN_EXE_polymq")).args(arguments).output().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<_> = printed.lines().map(str::trim_end).collect();
        text += &format!("## polymq {command}\n\n```text\n{}\n```\n\n", lines.join("\n").trim())
            .replace("polymq \n", "polymq\n");
    }
    text
}

fn cases() -> String {
    let mut table = "| case | needs | broken backends that it catches |\n|---|---|---|\n".to_owned();
    for case in polymq_testkit::cases::all() {
        let capability = case.decided_by(&polymq::Capabilities::default());
        let broker = case.needs_broker().then_some("a broker");
        let needs = [broker, capability, case.needs_tool()].into_iter().flatten().collect::<Vec<_>>();
        let mutants = polymq_testkit::mutant::of(case).map(|mutant| mutant.name.replace('_', " ")).collect::<Vec<_>>();
        table += &format!("| {} | {} | {} |\n", case.id, needs.join(", "), mutants.join(", "));
    }
    table
}

/// Files of this repository with this ending, without what builds leave behind.
fn files(ending: &str) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![root().join("crates"), root().join("examples")]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == ending) {
                found.push(path);
            }
        }
    }
    found
}

/// Every test that docs/proof.md names is a function, a case of the suite or a file, and every row names one.
#[test]
fn every_test_in_the_proof_exists() {
    let sources: String = files("rs").iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let text = fs::read_to_string(root().join("docs/proof.md")).unwrap();
    let (by_hand, _) = text.split_once("<!-- generated: cases -->").unwrap();
    let rows = by_hand.lines().filter(|line| line.starts_with("| ") && !line.ends_with("| test |"));
    let mut wrong = Vec::new();
    for row in rows {
        let tests = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        let names: Vec<_> = tests.split('`').skip(1).step_by(2).collect();
        if names.is_empty() && tests != "the suite" {
            wrong.push(format!("no test: {row}"));
        }
        for name in names {
            let exists = if name.contains('/') {
                root().join(name).exists()
            } else {
                polymq_testkit::cases::find(name).is_some() || sources.contains(&format!("fn {name}("))
            };
            if !exists {
                wrong.push(format!("{name} does not exist: {row}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A page with Rust in it is compiled with the doc tests of a crate.
#[test]
fn every_rust_snippet_is_compiled() {
    let sources: String = files("rs").iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let readmes = files("md").into_iter().filter(|path| path.ends_with("README.md"));
    for page in pages().into_iter().chain(readmes) {
        let text = fs::read_to_string(&page).unwrap();
        if !text.contains("```rust") && !text.contains("```\nuse ") {
            continue;
        }
        assert!(!text.contains("```rust,ignore"), "a snippet of {} is not compiled", page.display());
        let folder = page.parent().unwrap();
        let of_crate = fs::read_to_string(folder.join("src/lib.rs"))
            .is_ok_and(|lib| lib.contains("#![doc = include_str!(\"../README.md\")]"));
        let relative = page.strip_prefix(root()).unwrap().display().to_string();
        let of_facade = sources.contains(&format!("#[doc = include_str!(\"../../../{relative}\")]"));
        assert!(of_crate || of_facade, "nothing compiles the snippets of {relative}");
    }
}

/// Errors of client libraries stay inside: they are reachable as the source of polymq's own error.
#[test]
fn j17_no_native_error_is_in_a_public_signature() {
    let natives = [
        "lapin::Error",
        "lapin::Result",
        "ClientError",
        "ConnectionError",
        "StateError",
        "KafkaError",
        "RDKafkaErrorCode",
        "SdkError",
        "legacy::Error",
        "hyper::Error",
        "tonic::Status",
        "transport::Error",
        "rusqlite::Error",
    ];
    let crates = ["amqp", "mqtt", "kafka", "sqs", "http", "kubemq", "embedded", "broker"];
    for path in files("rs") {
        let text = path.display().to_string();
        if !crates.iter().any(|name| text.contains(&format!("crates/{name}/src"))) {
            continue;
        }
        let source = fs::read_to_string(&path).unwrap();
        for signature in source.split("\n    pub ").chain(source.split("\npub ")).skip(1) {
            let signature = signature.split(['{', ';']).next().unwrap();
            let native = natives.iter().find(|native| signature.contains(*native));
            assert!(native.is_none(), "{text}: {signature}");
        }
    }
}

/// Links inside the repository lead somewhere.
#[test]
fn links_lead_somewhere() {
    let mut broken = Vec::new();
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for (_, target) in
            text.match_indices("](").map(|(at, _)| text[at + 2..].split_once(')').map_or(("", ""), |(t, _)| ("", t)))
        {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || path.contains("://") {
                continue;
            }
            if !page.parent().unwrap().join(path).exists() {
                broken.push(format!("{}: {target}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}
