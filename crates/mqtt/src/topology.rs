//! Names, and what "declare" means here: a durable session that holds a queue's messages.
//!
//! MQTT has no queues. The broker keeps messages for *sessions* that have subscribed, and a message that no session
//! wants is gone. So a queue is a row of durable sessions `<session>:q:<queue>:<n>` that share one subscription.
//! Session 0 is made by declaring the queue and holds its messages while nobody consumes.

use std::time::Duration;

use polymq_core::{
    Address, Capabilities, ChannelKind, Delay, DeliveryCount, ErrorKind, Order, RedeliveryOrder, Result, Support,
    Wildcards,
};

use crate::{
    config::{MqttConfig, Protocol},
    error::error,
};

/// What this backend can do under these settings.
pub(crate) fn capabilities(config: &MqttConfig) -> Capabilities {
    let v5 = config.protocol == Protocol::V5;
    let lossless = Delay { support: Support::Emulated, max: None };
    Capabilities {
        persistent: true,
        prefetch_bytes: true,
        queues: true,
        topics: true,
        groups: true,
        order: Order::SingleConsumer,
        requeue: Support::Emulated,
        redelivery: RedeliveryOrder::Any,
        delayed_retry: lossless,
        delivery_count: if v5 { DeliveryCount::Header } else { DeliveryCount::None },
        confirms: config.qos > 0,
        // Mosquitto decides where a QoS 2 message goes after it has answered with a reason.
        detects_unroutable: v5 && config.qos == 1,
        wildcards: Some(Wildcards { one: "+", many: "#", separator: "/" }),
        request_reply: v5,
        expiry: if v5 { Support::Native } else { Support::None },
        retained: true,
        max_headers: if v5 { None } else { Some(0) },
        max_payload: Some(config.max_payload),
        creates_channels: true,
        lookup: true,
        // MQTT 3.1.1 carries no kinds.
        filter: if v5 { Support::Emulated } else { Support::None },
        tls: cfg!(feature = "tls"),
        mutual_tls: cfg!(feature = "tls"),
        ..Capabilities::default()
    }
}

/// A queue or the group of a topic: something whose messages a row of sessions holds.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Durable {
    /// What every session of the row subscribes to.
    pub(crate) filter: String,
    /// Client id of the sessions, without their number.
    base: String,
    /// Topics on which consumers agree who takes which session, without the number.
    claims: String,
}

impl Durable {
    /// The row behind an address, if it has one: a topic without a group has not.
    pub(crate) fn of(config: &MqttConfig, address: &Address, group: Option<&str>) -> Option<Self> {
        let name = address.name();
        let (filter, base) = match (address.kind(), group) {
            (ChannelKind::Queue, _) => {
                (format!("$share/{}/{name}", config.share), format!("{}:q:{}", config.session, escape(name)))
            }
            (ChannelKind::Topic, Some(group)) => {
                (format!("$share/{group}/{name}"), format!("{}:t:{}:{}", config.session, escape(group), escape(name)))
            }
            (ChannelKind::Topic, None) => return None,
        };
        let claims = format!("{}/{base}", config.control);
        Some(Self { filter, base, claims })
    }

    /// Client id of one session.
    pub(crate) fn session(&self, number: u16) -> String {
        format!("{}:{number}", self.base)
    }

    /// Topic on which one session is claimed.
    pub(crate) fn claim(&self, number: u16) -> String {
        format!("{}/{number}", self.claims)
    }
}

/// Topic on which connections say that they have left sessions behind.
pub(crate) fn gone_topic(config: &MqttConfig) -> String {
    format!("{}/gone", config.control)
}

/// Brokers use client ids in access rules and topics, where these characters have a meaning.
fn escape(name: &str) -> String {
    let mut escaped = String::with_capacity(name.len());
    for character in name.chars() {
        match character {
            '%' | '+' | '#' | '/' | ':' | '$' => escaped.push_str(&format!("%{:02X}", character as u32)),
            other => escaped.push(other),
        }
    }
    escaped
}

/// Checks a channel name; wildcards only where they are consumed.
pub(crate) fn check_address(address: &Address) -> Result<()> {
    let name = address.name();
    let refuse = |rule: &str| {
        Err(error(ErrorKind::InvalidInput, format!("the {} name {name:?} {rule}", address.kind())).with_channel(name))
    };
    if let Err(rule) = check_name(name) {
        return refuse(rule);
    }
    if !name.contains(['+', '#']) {
        return Ok(());
    }
    if address.kind() == ChannelKind::Queue {
        return refuse("holds a wildcard; queues have none");
    }
    let mut levels = name.split('/').peekable();
    while let Some(level) = levels.next() {
        let alone = level.len() == 1;
        if (level.contains('+') && !alone) || (level.contains('#') && (!alone || levels.peek().is_some())) {
            return refuse("has a misplaced wildcard: + and # stand alone between /, and # comes last");
        }
    }
    Ok(())
}

/// Refuses to send to a wildcard.
pub(crate) fn check_published(address: &Address) -> Result<()> {
    check_address(address)?;
    if address.name().contains(['+', '#']) {
        let sentence = format!("the topic name {:?} holds a wildcard and cannot be sent to", address.name());
        return Err(error(ErrorKind::InvalidInput, sentence).with_channel(address.name()));
    }
    Ok(())
}

/// Groups are names of shared subscriptions (section 4.8.2).
pub(crate) fn check_group(group: &str) -> Result<()> {
    if check_name(group).is_err() || group.contains(['/', '+', '#']) || group.len() > 200 {
        let sentence = format!("the group name {group:?} holds one of / + # $ or a control character, or is too long");
        return Err(error(ErrorKind::InvalidInput, sentence));
    }
    Ok(())
}

/// Rules of names that go to the broker as they are.
pub(crate) fn check_name(name: &str) -> Result<(), &'static str> {
    match name {
        "" => Err("is empty"),
        _ if name.starts_with('$') => Err("starts with $, which the broker keeps for itself"),
        _ if !is_clean(name) => Err("holds a character that MQTT does not allow"),
        _ => Ok(()),
    }
}

/// Refuses text that would make the broker close the connection.
pub(crate) fn check_text(what: &str, text: &str) -> Result<()> {
    if text.len() > usize::from(u16::MAX) {
        return Err(error(ErrorKind::TooLarge, format!("{what} has {} bytes, at most 65535 are allowed", text.len())));
    }
    if !is_clean(text) {
        let sentence = format!("{what} holds a control character or a non-character, which MQTT does not allow");
        return Err(error(ErrorKind::InvalidInput, sentence));
    }
    Ok(())
}

/// Section 1.5.4: no NUL, and receivers may refuse control characters and non-characters; mosquitto does.
fn is_clean(text: &str) -> bool {
    if text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return true;
    }
    text.chars().all(|character| {
        let code = character as u32;
        !character.is_control() && code & 0xfffe != 0xfffe && !(0xfdd0..=0xfdef).contains(&code)
    })
}

/// How long the session of a topic's own subscription outlives its connection: as long as a reconnect may take.
pub(crate) const OWN_SESSION: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_have_one_name_each() {
        let config = MqttConfig::default();
        let queue = Durable::of(&config, &Address::queue("a/b:c"), Some("ignored")).expect("durable");
        assert_eq!(queue.filter, "$share/polymq/a/b:c");
        assert_eq!(queue.session(0), "polymq:q:a%2Fb%3Ac:0");
        assert_eq!(queue.claim(3), "$polymq/polymq:q:a%2Fb%3Ac/3");
        let group = Durable::of(&config, &Address::topic("a/+/#"), Some("g")).expect("durable");
        assert_eq!(group.filter, "$share/g/a/+/#");
        assert_eq!(group.session(1), "polymq:t:g:a%2F%2B%2F%23:1");
        assert_eq!(Durable::of(&config, &Address::topic("a"), None), None);
        let of = |address, group| Durable::of(&config, &address, group).expect("durable").session(0);
        let names = [
            of(Address::queue("a"), None),
            of(Address::queue("a:0"), None),
            of(Address::queue("a%3A0"), None),
            of(Address::topic("a"), Some("g")),
            of(Address::topic("g"), Some("a")),
            of(Address::topic("a:b"), Some("g")),
            of(Address::topic("b"), Some("g:a")),
        ];
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
    }

    #[test]
    fn names() {
        for (address, consumed, published) in [
            (Address::queue("orders"), true, true),
            (Address::queue("orders.dlq"), true, true),
            (Address::queue("Bestellungen/größe"), true, true),
            (Address::queue("a/+"), false, false),
            (Address::queue("$SYS/x"), false, false),
            (Address::topic("$share/g/x"), false, false),
            (Address::topic("a/+/b"), true, false),
            (Address::topic("+"), true, false),
            (Address::topic("#"), true, false),
            (Address::topic("a/#"), true, false),
            (Address::topic("a/#/b"), false, false),
            (Address::topic("a+/b"), false, false),
            (Address::topic("a#"), false, false),
            (Address::topic("a\u{0}b"), false, false),
            (Address::topic("a\u{fffe}b"), false, false),
            (Address::topic(""), false, false),
        ] {
            assert_eq!(check_address(&address).is_ok(), consumed, "{address:?} consumed");
            assert_eq!(check_published(&address).is_ok(), published, "{address:?} published");
        }
        for (group, good) in [("audit", true), ("a.b", true), ("a/b", false), ("a+", false), ("$g", false), ("", false)]
        {
            assert_eq!(check_group(group).is_ok(), good, "{group:?}");
        }
    }

    #[test]
    fn version_3_1_1_promises_less() {
        let five = capabilities(&MqttConfig::default());
        let old = capabilities(&MqttConfig { protocol: Protocol::V311, ..MqttConfig::default() });
        assert!(five.detects_unroutable && !old.detects_unroutable);
        assert_eq!((five.max_headers, old.max_headers), (None, Some(0)));
        assert_eq!((five.delivery_count, old.delivery_count), (DeliveryCount::Header, DeliveryCount::None));
    }
}
