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
    let registry = Registry::linked().unwrap();
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
    for command in
        ["", "backends", "send", "consume", "check", "dead-letters", "dead-letters list", "dead-letters replay"]
    {
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
