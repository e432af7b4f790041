//! Names of channels as names of queues and topics.
//!
//! SQS and SNS know letters, digits, `-` and `_`, and the ending `.fifo`. A dot, which polymq itself uses in `<queue>.dlq`,
//! is written `--`; whatever would make two names one is refused, so that the mapping is one to one.

use polymq_core::{Address, ChannelKind, Result};

use crate::error;

/// The longest name of a queue.
const MAX_QUEUE: usize = 80;
/// The longest name of a topic.
const MAX_TOPIC: usize = 256;
/// Between a topic and its group; no name holds it, because `-` beside `.` is refused.
const GROUP: &str = "---";
const FIFO: &str = ".fifo";
/// Digits at the end of the name of a queue that one consumer has for itself.
const OWN: usize = 24;

/// A name at the broker.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Name {
    pub(crate) text: String,
    pub(crate) fifo: bool,
}

impl Name {
    fn new(mut text: String, fifo: bool, max: usize, of: &str) -> Result<Self> {
        if fifo {
            text += FIFO;
        }
        if text.len() > max {
            return Err(error::invalid(format!(
                "the name {of:?} is {text:?} at the broker, {} characters long, and at most {max} are possible",
                text.len()
            ))
            .with_hint("choose a shorter name"));
        }
        Ok(Self { text, fifo })
    }
}

/// The queue of an address, or the queue of a topic's group; a topic without a group has one without a fixed name.
pub(crate) fn queue(address: &Address, group: Option<&str>, fifo: bool) -> Result<Option<Name>> {
    let name = address.name();
    let (base, fifo) = split(name, fifo);
    let text = match (address.kind(), group) {
        (ChannelKind::Queue, _) => plain(&base, name)?,
        (ChannelKind::Topic, Some(group)) => format!("{}{GROUP}{}", plain(&base, name)?, plain(group, group)?),
        (ChannelKind::Topic, None) => return Ok(None),
    };
    Name::new(text, fifo, MAX_QUEUE, name).map(Some)
}

/// The name of a topic.
pub(crate) fn topic(name: &str, fifo: bool) -> Result<Name> {
    let (base, fifo) = split(name, fifo);
    Name::new(plain(&base, name)?, fifo, MAX_TOPIC, name)
}

/// A name for the queue of one consumer of a topic, that no other one has.
pub(crate) fn own_queue(topic: &Name) -> Name {
    let base: String = topic.text.trim_end_matches(FIFO).chars().take(40).collect();
    let fifo = if topic.fifo { FIFO } else { "" };
    Name { text: format!("{base}{GROUP}{:0OWN$x}{fifo}", fastrand::u128(..) >> 32), fifo: topic.fifo }
}

/// The address behind the name of a queue, with the group of a topic; `None` for one that polymq would not give, and for
/// those of consumers without a group.
pub(crate) fn of_queue(text: &str, fifo: bool) -> Option<(Address, Option<String>)> {
    let base = base(text, fifo)?;
    match base.split_once(GROUP) {
        Some((topic, group)) => {
            let own = group.len() == OWN && group.bytes().all(|byte| byte.is_ascii_hexdigit());
            let address = Address::topic(spoken(topic)? + ending(text, fifo));
            spoken(group).filter(|_| !own).map(|group| (address, Some(group)))
        }
        None if text.ends_with(FIFO) && !fifo && base.ends_with("--dlq") => {
            Some((Address::queue(format!("{}.fifo.dlq", spoken(base.strip_suffix("--dlq")?)?)), None))
        }
        None => Some((Address::queue(spoken(base)? + ending(text, fifo)), None)),
    }
}

/// The name behind the name of a topic.
pub(crate) fn of_topic(text: &str, fifo: bool) -> Option<String> {
    Some(spoken(base(text, fifo)?)? + ending(text, fifo))
}

/// Without the ending; `None` where every name has one and this has not.
fn base(text: &str, fifo: bool) -> Option<&str> {
    match text.strip_suffix(FIFO) {
        Some(base) => Some(base),
        None => (!fifo).then_some(text),
    }
}

fn ending(text: &str, fifo: bool) -> &'static str {
    if text.ends_with(FIFO) && !fifo { FIFO } else { "" }
}

fn spoken(base: &str) -> Option<String> {
    let name = base.replace("--", ".");
    (plain(&name, &name).ok()? == base).then_some(name)
}

/// The name without its ending, and whether it is a first-in-first-out channel. The dead letters of such a queue are
/// one too: SQS moves messages by itself to no other.
fn split(name: &str, fifo: bool) -> (String, bool) {
    if let Some(base) = name.strip_suffix(FIFO) {
        return (base.to_owned(), true);
    }
    match name.strip_suffix(".fifo.dlq") {
        Some(base) => (format!("{base}.dlq"), true),
        None => (name.to_owned(), fifo),
    }
}

fn plain(base: &str, name: &str) -> Result<String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let problem = if let Some(c) = base.chars().find(|c| !allowed(*c)) {
        format!("the name {name:?} holds {c:?}; expected letters, digits, '-', '_' and '.'")
    } else if ["--", ".-", "-."].iter().any(|pair| base.contains(pair)) || base.contains(FIFO) {
        format!(
            "the name {name:?} holds \"--\", '-' beside '.', or .fifo before its end; a dot is written \"--\" at the broker"
        )
    } else if base.is_empty() || base.starts_with('-') || base.ends_with('-') {
        format!("the name {name:?} begins or ends with '-', or is only an ending; expected a letter, digit, '_' or '.'")
    } else {
        return Ok(base.replace('.', "--"));
    };
    Err(error::invalid(problem).with_hint("choose another name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str) -> Option<String> {
        queue(&Address::queue(name), None, false).ok().flatten().map(|name| name.text)
    }

    #[test]
    fn dots_are_written_and_no_two_names_are_one() {
        assert_eq!(of("orders").as_deref(), Some("orders"));
        assert_eq!(of("orders.dlq").as_deref(), Some("orders--dlq"));
        assert_eq!(of("orders.fifo").as_deref(), Some("orders.fifo"));
        assert_eq!(of("orders.fifo.dlq").as_deref(), Some("orders--dlq.fifo"));
        for refused in ["a--b", "a.-b", "a-.b", "-a", "a-", "ä", "a b", "a/b", "a.fifo.b", ".fifo"] {
            assert_eq!(of(refused), None, "{refused}");
        }
        assert_eq!(of(&"n".repeat(80)).map(|name| name.len()), Some(80));
        assert_eq!(of(&"n".repeat(81)), None);
    }

    #[test]
    fn groups_have_queues_that_no_queue_is_called() {
        let topic = Address::topic("orders.created");
        let name = queue(&topic, Some("billing"), false).expect("fits").expect("a group");
        assert_eq!((name.text.as_str(), name.fifo), ("orders--created---billing", false));
        let name = queue(&topic, Some("billing"), true).expect("fits").expect("a group");
        assert_eq!(name.text, "orders--created---billing.fifo");
        assert_eq!(queue(&topic, None, false).expect("fits"), None);
        let own = own_queue(&super::topic("orders.fifo", false).expect("a name"));
        assert!(own.fifo && own.text.starts_with("orders---") && own.text.len() <= 80, "{own:?}");
    }

    #[test]
    fn names_are_read_back() {
        let queue = |name| Some((Address::queue(name), None));
        for name in ["orders", "orders.dlq", "orders.fifo", "orders.fifo.dlq", "a_b-c.d"] {
            assert_eq!(of_queue(&of(name).expect("a name"), false), queue(name), "{name}");
        }
        let group = Some((Address::topic("orders.created"), Some("billing".to_owned())));
        assert_eq!(of_queue("orders--created---billing", false), group);
        assert_eq!(of_queue("orders--created---billing.fifo", true), group);
        assert_eq!((of_queue("orders.fifo", true), of_queue("orders", true)), (queue("orders"), None));
        let own = own_queue(&super::topic("orders", false).expect("a name")).text;
        assert_eq!((of_queue(&own, false), of_queue("-x", false)), (None, None));
        assert_eq!(of_topic("prices--eur", false).as_deref(), Some("prices.eur"));
    }

    #[test]
    fn the_connection_may_ask_for_order() {
        let name = queue(&Address::queue("orders.dlq"), None, true).expect("fits").expect("a queue");
        assert_eq!((name.text.as_str(), name.fifo), ("orders--dlq.fifo", true));
    }
}
