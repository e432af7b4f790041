//! Names of channels, and the names of what polymq makes for itself beside them.
//!
//! A group of a topic is two queues: one that gets its messages, and one that keeps how far it is.

use polymq_core::{Address, ChannelKind, Result};

use crate::{config::Topics, error};

/// Between a topic and its group, in the name of the queue of the group's messages.
const GROUP: &str = "polymq-group";
/// Likewise, in the name of the queue of its position.
const POSITION: &str = "polymq-position";

/// Refuses names that KubeMQ cannot carry. `;` and `:` steer the routing of its commercial server.
pub(crate) fn check(address: &Address, topics: Topics) -> Result<()> {
    let pattern = address.kind() == ChannelKind::Topic && topics == Topics::Events;
    check_text(&address.to_string(), address.name(), pattern)
}

pub(crate) fn check_group(group: &str) -> Result<()> {
    check_text(&format!("group {group}"), group, false)
}

fn check_text(what: &str, name: &str, pattern: bool) -> Result<()> {
    let rule = if name.contains(char::is_whitespace) {
        "holds white space"
    } else if !pattern && name.contains(['*', '>']) {
        "holds * or >, which are wildcards"
    } else if name.contains([';', ':']) {
        "holds ; or :, by which KubeMQ routes"
    } else if name.split('.').any(str::is_empty) {
        "begins or ends with a dot, or has two in a row"
    } else if name.split('.').any(|token| token == GROUP || token == POSITION) {
        "has a part that polymq keeps for its groups"
    } else {
        return Ok(());
    };
    Err(error::invalid(format!("the {what} {rule}, which KubeMQ cannot carry")).with_hint("choose another name"))
}

/// The queue of a group's messages.
pub(crate) fn of_group(topic: &str, group: &str) -> String {
    format!("{topic}.{GROUP}.{group}")
}

/// The queue of a group's position, and the stored channel that only one of its members may read at a time.
pub(crate) fn of_position(topic: &str, group: &str) -> String {
    format!("{topic}.{POSITION}.{group}")
}

/// What the queue of a name is: somebody's, a group's, or polymq's own.
pub(crate) fn of_queue(name: &str) -> Option<(Address, Option<String>)> {
    if name.contains(&format!(".{POSITION}.")) {
        return None;
    }
    match name.split_once(&format!(".{GROUP}.")) {
        Some((topic, group)) => Some((Address::topic(topic), Some(group.to_owned()))),
        None => Some((Address::queue(name), None)),
    }
}

/// Whether a stored channel is a topic, not polymq's own.
pub(crate) fn is_topic(name: &str) -> bool {
    !name.contains(&format!(".{POSITION}."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_kubemq_cannot_carry_are_refused() {
        for name in ["a b", "a*", "a.>", "a.", ".a", "a..b", "a;b", "queues:a", "a.polymq-group.b"] {
            assert!(check(&Address::queue(name), Topics::Store).is_err(), "{name}");
        }
        for name in ["a", "a.b", "ä/b", "A_1-2", "polymq-reply-1"] {
            assert!(check(&Address::queue(name), Topics::Store).is_ok(), "{name}");
        }
        assert!(check(&Address::topic("a.*"), Topics::Store).is_err());
        assert!(check(&Address::topic("a.*"), Topics::Events).is_ok());
    }

    #[test]
    fn groups_are_known_by_their_queues() {
        let (topic, group) = ("a.b", "c.d");
        assert_eq!(of_queue(&of_group(topic, group)), Some((Address::topic("a.b"), Some("c.d".to_owned()))));
        assert_eq!(of_queue(&of_position(topic, group)), None);
        assert!(!is_topic(&of_position(topic, group)) && is_topic(topic));
        assert_eq!(of_queue("a.b"), Some((Address::queue("a.b"), None)));
    }
}
