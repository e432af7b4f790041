//! `polymq backends`: the capability table, or everything about one backend.

use std::{collections::BTreeSet, sync::Arc};

use polymq::{__private::inventory, Backend, KnownBackend, Registry};
use serde_json::{Value, json};

use crate::{
    args::Backends,
    exit::{Exit, Failed},
    output::Output,
};

pub(crate) fn run(options: &Backends, output: &Output) -> Result<Exit, Failed> {
    let registry = Registry::linked();
    match &options.name {
        Some(name) => one(registry.backend(name)?.as_ref(), output)?,
        None => all(&registry, output)?,
    }
    Ok(Exit::Done)
}

fn all(registry: &Registry, output: &Output) -> std::io::Result<()> {
    let absent = absent(registry);
    if output.is_json() {
        for backend in registry.iter() {
            output.line(object(backend.as_ref()).to_string())?;
        }
        for (name, hint) in absent {
            output.line(json!({ "name": name, "linked": false, "hint": hint }).to_string())?;
        }
        return Ok(());
    }
    let backends: Vec<&Arc<dyn Backend>> = registry.iter().collect();
    let columns: Vec<_> = backends.iter().map(|backend| backend.capabilities().table()).collect();
    let mut rows = vec![row("", backends.iter().map(|backend| backend.name().to_owned()))];
    let names = columns.first().map(|column| column.iter().map(|(name, _)| name.clone())).into_iter().flatten();
    for (at, name) in names.enumerate() {
        let words = columns.iter().map(|column| column.get(at).map(|(_, word)| word.clone()).unwrap_or_default());
        rows.push(row(&name.replace('_', " "), words));
    }
    for line in aligned(&rows) {
        output.line(line)?;
    }
    output.line("")?;
    for (name, hint) in absent {
        output.line(format!("{name}: not in this program; {hint}"))?;
    }
    output.line("polymq backends NAME lists the settings of one")
}

fn one(backend: &dyn Backend, output: &Output) -> std::io::Result<()> {
    if output.is_json() {
        return output.line(object(backend).to_string());
    }
    output.line(format!("{}, chosen by POLYMQ_BACKEND={} or a URL:", backend.name(), backend.name()))?;
    let schemes = backend.schemes().iter().map(|scheme| format!("{scheme}://")).collect::<Vec<_>>().join(", ");
    output.line(format!("  {schemes}\n"))?;
    let header = ["setting", "default", "meaning"].map(str::to_owned).to_vec();
    let settings = backend.keys().iter().map(|key| [key.name, key.default, key.help].map(str::to_owned).to_vec());
    for line in aligned(&std::iter::once(header).chain(settings).collect::<Vec<_>>()) {
        output.line(line)?;
    }
    let upper = backend.name().to_uppercase();
    output.line(format!("\nEach setting is also a variable: POLYMQ_{upper}_<SETTING>"))?;
    for (variable, key) in backend.foreign_variables() {
        output.line(format!("{variable} sets {key:?}, more weakly"))?;
    }
    Ok(())
}

fn object(backend: &dyn Backend) -> Value {
    json!({
        "name": backend.name(),
        "linked": true,
        "aliases": backend.aliases(),
        "schemes": backend.schemes(),
        "capabilities": backend.capabilities(),
        "settings": backend.keys(),
        "variables": backend.foreign_variables().iter().map(|(variable, key)| json!([variable, key])).collect::<Vec<_>>(),
    })
}

/// The backends of this project that are not linked, by name.
fn absent(registry: &Registry) -> BTreeSet<(&'static str, &'static str)> {
    let known = inventory::iter::<KnownBackend>.into_iter();
    known.filter(|known| registry.backend(known.name).is_err()).map(|known| (known.name, known.hint)).collect()
}

fn row(name: &str, words: impl Iterator<Item = String>) -> Vec<String> {
    std::iter::once(name.to_owned()).chain(words).collect()
}

/// The rows with their columns below each other.
fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|word| word.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or_default()).collect();
    let line = |row: &Vec<String>| {
        let words = row.iter().zip(&widths).map(|(word, width)| format!("{word:width$}"));
        words.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}
