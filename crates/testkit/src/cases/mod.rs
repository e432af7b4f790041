//! The cases, one function each. The name of a case begins with its number in the contract's list.

pub mod admin;
pub mod attempts;
pub mod bodies;
pub mod closing;
pub mod connecting;
pub mod context;
pub mod counters;
pub mod dead_letters;
pub mod faults;
pub mod flow;
pub mod handling;
pub mod headers;
pub mod health;
pub mod late_settlement;
pub mod lifecycle;
pub mod many;
pub mod names;
pub mod order;
pub mod requests;
pub mod retry;
pub mod secrets;
pub mod settlement;
pub mod signing;
pub mod stopping;
pub mod topics;

use crate::Case;

const ALL: &[&[Case]] = &[
    bodies::CASES,
    headers::CASES,
    many::CASES,
    names::CASES,
    topics::CASES,
    admin::CASES,
    requests::CASES,
    connecting::CASES,
    settlement::CASES,
    late_settlement::CASES,
    attempts::CASES,
    handling::CASES,
    retry::CASES,
    dead_letters::CASES,
    order::CASES,
    flow::CASES,
    stopping::CASES,
    lifecycle::CASES,
    closing::CASES,
    health::CASES,
    context::CASES,
    counters::CASES,
    secrets::CASES,
    signing::CASES,
    faults::backoff::CASES,
    faults::restart::CASES,
    faults::network::CASES,
    faults::away::CASES,
    faults::acks::CASES,
    faults::channels::CASES,
    faults::credentials::CASES,
    faults::pressure::CASES,
    faults::killed::CASES,
    faults::paths::CASES,
    faults::clock::CASES,
    faults::poison::CASES,
];

/// Every case, in the order of the list.
pub fn all() -> impl Iterator<Item = &'static Case> {
    ALL.iter().copied().flatten()
}

/// The case of this name.
#[must_use]
pub fn find(id: &str) -> Option<&'static Case> {
    all().find(|case| case.id == id)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use polymq_core::Capabilities;

    /// What no case decides by, and why.
    const ELSEWHERE: &[(&str, &str)] = &[
        ("queues", "every case uses one: a backend without queues passes nothing"),
        ("confirms", "B7 and L3 ask of every backend that `Ok` means accepted; without, it would fail them"),
        (
            "creates_channels",
            "B5_created_by_policy asks it of every backend; the setting that turns it off is each backend's own",
        ),
        (
            "native_dead_letter",
            "what the broker moves itself depends on its queues' own settings: tests of amqp and sqs",
        ),
        ("transactions", "only Kafka has them: crates/kafka/tests/broker/transactions.rs"),
        ("seek", "only Kafka has it: crates/kafka/tests/broker/positions.rs"),
        ("retained", "only MQTT has it: its own tests"),
        ("priority", "no backend declares it"),
        ("max_batch_send", "how calls of the protocol are cut is not seen from outside: tests of sqs"),
        ("max_batch_receive", "as above"),
        ("prefetch_bytes", "not every backend bounds bytes, and O5 bounds the memory of all"),
        ("tls", "secure connections need certificates: the tests named secure or tls of each backend"),
        ("mutual_tls", "as above"),
    ];

    fn sources(folder: &Path, into: &mut String) {
        for entry in fs::read_dir(folder).expect("the cases") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                sources(&path, into);
            } else {
                into.push_str(&fs::read_to_string(&path).expect("a source"));
            }
        }
    }

    /// Whether a case reads this field, of `c` in a gate or of `cx.capabilities()`.
    fn is_read(sources: &str, field: &str) -> bool {
        let owners = ["c", "can", "capabilities", "capabilities()"];
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        owners.iter().any(|owner| {
            let wanted = format!("{owner}.{field}");
            sources
                .match_indices(&wanted)
                .any(|(at, _)| !sources[..at].ends_with(is_name) && !sources[at + wanted.len()..].starts_with(is_name))
        })
    }

    #[test]
    fn every_capability_is_decided_by_a_case_or_named_here() {
        let mut text = String::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cases"), &mut text);
        let fields: BTreeSet<String> = Capabilities::default().table().into_iter().map(|(name, _)| name).collect();
        assert!(fields.len() > 30, "{fields:?}");
        for field in &fields {
            let elsewhere = ELSEWHERE.iter().any(|(name, _)| name == field);
            assert!(elsewhere || is_read(&text, field), "no case reads the capability {field}, and no reason is given");
            assert!(!(elsewhere && is_read(&text, field)), "{field} is read by a case, and said not to be");
        }
        for (name, reason) in ELSEWHERE {
            assert!(fields.contains(*name) && !reason.is_empty(), "there is no capability {name}");
        }
    }
}
