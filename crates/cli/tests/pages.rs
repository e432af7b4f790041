//! The book is whole: the same headings for each backend, no page too long, every page in the index, every promise with
//! its proof, and the code of the guides is code that is compiled and tested.
#![cfg(all(feature = "amqp", feature = "http", feature = "kafka", feature = "mqtt", feature = "sqs"))]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use polymq::Registry;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Pages below `docs`, by their path from there.
fn book() -> Vec<String> {
    let (mut pages, mut folders) = (Vec::new(), vec![root().join("docs")]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "md") {
                pages.push(path.strip_prefix(root().join("docs")).unwrap().display().to_string());
            }
        }
    }
    pages
}

fn headings(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.strip_prefix("## ")).collect()
}

#[test]
fn every_backend_has_the_same_headings() {
    for backend in Registry::linked().names() {
        let page = format!("docs/backends/{backend}.md");
        let expected =
            ["Address", "Queues and topics", "Settings", "Delivery", "Other clients", "Watch", "Capabilities"];
        assert_eq!(headings(&read(&page)), expected, "{page}");
        let readme = format!("crates/{backend}/README.md");
        // The memory backend is part of the core.
        if root().join(&readme).exists() {
            let expected = [
                "What it connects to",
                "URL and keys",
                "Queue and topic mapping",
                "Delivery semantics",
                "Capabilities",
                "Escape to the native client",
            ];
            assert_eq!(headings(&read(&readme)), expected, "{readme}");
        }
    }
}

#[test]
fn the_index_has_every_page() {
    let index = read("docs/README.md");
    let missing: Vec<_> =
        book().into_iter().filter(|page| page != "README.md" && !index.contains(&format!("]({page})"))).collect();
    assert!(missing.is_empty(), "docs/README.md does not name {missing:?}");
}

/// What is written by hand; tables that are made from the code are as long as the code has it.
#[test]
fn no_page_is_too_long() {
    const MOST: usize = 220;
    for page in book() {
        // Tables by their nature, or written by a program.
        if ["proof.md", "cli.md", "benchmarks.md", "faults.md"].contains(&page.as_str()) {
            continue;
        }
        let text = read(&format!("docs/{page}"));
        let parts = text.split("<!-- generated: ").enumerate();
        let by_hand = parts.map(|(at, part)| if at == 0 { part } else { part.split_once("<!-- end -->").unwrap().1 });
        let lines = by_hand.map(|part| part.lines().count()).sum::<usize>();
        assert!(lines <= MOST, "docs/{page} has {lines} lines; split it");
    }
}

/// Each case that the page names exists, and each case of the suite is named by a promise.
#[test]
fn every_promise_has_its_cases_and_every_case_its_promise() {
    let text = read("docs/delivery-semantics.md");
    let rows = text.lines().filter(|line| line.starts_with("| ") && !line.ends_with("| cases |"));
    let mut named = BTreeSet::new();
    for row in rows {
        let cases: Vec<_> =
            row.trim_end_matches(" |").rsplit(" | ").next().unwrap().split('`').skip(1).step_by(2).collect();
        assert!(!cases.is_empty(), "a promise without a case: {row}");
        named.extend(cases);
    }
    let cases: BTreeSet<_> = polymq_testkit::cases::all().map(|case| case.id).collect();
    let unknown: Vec<_> = named.difference(&cases).collect();
    let unnamed: Vec<_> = cases.difference(&named).collect();
    assert!(unknown.is_empty(), "docs/delivery-semantics.md names cases that do not exist: {unknown:?}");
    assert!(unnamed.is_empty(), "docs/delivery-semantics.md has no promise for {unnamed:?}");
}

/// Each snippet of the guide is a piece of the file that it names, which is compiled, and run through the suite.
#[test]
fn the_guide_for_backends_shows_the_toy_backend() {
    let text = read("docs/writing-a-backend.md");
    let mut snippets = 0;
    for part in text.split("\n```rs ").skip(1) {
        let (path, rest) = part.split_once('\n').unwrap();
        let (snippet, _) = rest.split_once("\n```").unwrap();
        let source = read(path.trim());
        // An ellipsis stands for lines that are left out.
        let mut from = 0;
        for piece in snippet.split("// …").map(str::trim) {
            let found = source[from..].find(piece);
            from += found.unwrap_or_else(|| panic!("{path} does not have, after the piece before:\n{piece}"));
        }
        snippets += 1;
    }
    assert!(snippets >= 8, "{snippets} snippets");
    assert!(!text.contains("```rust"), "a snippet of Rust names no file");
    for file in ["crates/testkit/tests/toy/mod.rs", "crates/testkit/tests/toy_backend.rs"] {
        assert!(text.contains(file), "{file} is not in the guide");
    }
}

/// The development stack of Docker Compose: the brokers that scripts/brokers knows, each pinned, checked for health, with
/// a profile of its own, and reachable from this machine only.
#[test]
fn j24_the_compose_file_has_every_broker_of_the_script() {
    let parsed = yaml_rust2::YamlLoader::load_from_str(&read("docker-compose.yml")).expect("YAML");
    let services = parsed[0]["services"].as_hash().expect("services");
    let mut names = Vec::new();
    for (name, service) in services {
        let name = name.as_str().expect("a name");
        let image = service["image"].as_str().expect("an image");
        let tag = image.rsplit_once(':').map_or("", |(_, tag)| tag);
        assert!(tag.contains('.') && tag.starts_with(|c: char| c.is_ascii_digit()), "{name}: {image} is not pinned");
        let texts = |key: &str| -> Vec<String> {
            let list = service[key].as_vec().unwrap_or_else(|| panic!("{name} has no {key}"));
            list.iter().map(|text| text.as_str().expect("text").to_owned()).collect()
        };
        assert_eq!(texts("profiles"), [name, "all"]);
        assert!(texts("ports").iter().all(|port| port.starts_with("127.0.0.1:")), "{name} is open to others");
        let health = &service["healthcheck"];
        assert!(health["test"].as_vec().is_some_and(|test| test.len() > 1), "{name} has no health check");
        assert!(health["interval"].as_str().is_some() && health["retries"].as_i64().is_some(), "{name}: {health:?}");
        names.push(name.to_owned());
    }
    let script = read("scripts/brokers");
    let all = script.lines().find_map(|line| line.strip_prefix("readonly ALL=(")?.strip_suffix(')')).expect("ALL");
    let known: Vec<_> = all.split_whitespace().collect();
    assert_eq!(names, known, "docker-compose.yml and scripts/brokers have the same brokers, in the same order");
    // Volumes and configurations that are named are there.
    for (name, service) in services {
        for (key, place) in [("volumes", "volumes"), ("configs", "configs")] {
            for used in service[key].as_vec().into_iter().flatten() {
                let text = used.as_str().map(|text| text.split(':').next().unwrap_or_default());
                let used = text.or_else(|| used["source"].as_str()).expect("a name");
                let known =
                    parsed[0][place].as_hash().is_some_and(|hash| hash.keys().any(|key| key.as_str() == Some(used)));
                assert!(known, "{name:?} uses {used}, which {place} does not have");
            }
        }
    }
}
