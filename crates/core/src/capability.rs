//! What a backend can do, as data: printed by the command line, embedded in the docs, and asserted both ways by
//! the conformance suite. A declared yes passes its cases, a declared no is refused with a typed error.

use std::time::Duration;

use serde::Serialize;

/// How a backend does something that brokers do differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Support {
    /// It cannot; asking for it is refused.
    #[default]
    None,
    /// polymq does it on top of the broker, without loss.
    Emulated,
    /// The broker does it.
    Native,
}

impl Support {
    /// Whether it can be done at all.
    #[must_use]
    pub const fn is_available(self) -> bool {
        !matches!(self, Self::None)
    }
}

/// The order in which a queue's messages reach their handlers while nothing fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// No promise.
    #[default]
    None,
    /// As sent, while one consumer handles one message at a time.
    SingleConsumer,
    /// As sent for messages of one key, with any number of consumers.
    PerKey,
    /// As sent, always.
    Total,
}

/// Where the attempt number of a delivery comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DeliveryCount {
    /// Unknown after a restart.
    #[default]
    None,
    /// A header of the copy that a retry sends.
    Header,
    /// The broker counts.
    Native,
}

/// Where a message comes again that is retried without a delay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RedeliveryOrder {
    /// Before the messages that wait.
    Front,
    /// After the messages that wait.
    #[default]
    Back,
    /// Anywhere.
    Any,
}

/// Delayed delivery and its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Delay {
    /// Who does it.
    pub support: Support,
    /// The longest delay, if there is a bound.
    pub max: Option<Duration>,
}

impl Delay {
    fn limited_to(self, other: Self) -> Self {
        let max = [self.max, other.max].into_iter().flatten().min();
        Self { support: limited(self.support, other.support), max }
    }
}

fn limited(own: Support, other: Support) -> Support {
    if other.is_available() { own } else { Support::None }
}

/// Wildcards in the name of a topic that is consumed, in the broker's own syntax.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Wildcards {
    /// Stands for one level.
    pub one: &'static str,
    /// Stands for any number of levels.
    pub many: &'static str,
    /// Between levels.
    pub separator: &'static str,
}

/// What a backend can do. `Default` is "nothing", so that a new field touches only the backends that have it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Capabilities {
    /// Nobody stands between sender and consumer, and nobody keeps a message: a send completes when its message has been
    /// handled, and what fails or is rejected is answered to the sender, who keeps it.
    pub direct: bool,
    /// An accepted message survives a restart of the broker.
    pub persistent: bool,
    /// Queues: each message to one consumer.
    pub queues: bool,
    /// Topics: each message to every group.
    pub topics: bool,
    /// A queue and a topic of one name are two channels; otherwise using both over one bus is refused.
    pub kinds_apart: bool,
    /// Named groups that share the messages of a topic.
    pub groups: bool,
    /// What is sent to a topic reaches who is there at that moment, at most once: a send completes without the broker's answer,
    /// and a group misses what is sent while none of its members is there.
    pub at_most_once_topics: bool,
    /// A new group sees messages that were sent before it.
    pub replay: bool,
    /// Order while nothing fails.
    pub order: Order,
    /// Immediate return of a message for another attempt.
    pub requeue: Support,
    /// Where a message comes again that is retried without a delay.
    pub redelivery: RedeliveryOrder,
    /// Return of a message for another attempt after a delay.
    pub delayed_retry: Delay,
    /// Sending now what is delivered later.
    pub delayed_send: Delay,
    /// Where the attempt number comes from.
    pub delivery_count: DeliveryCount,
    /// Dead letters that the broker itself moves; every backend moves them through polymq.
    pub native_dead_letter: bool,
    /// A send completes when the broker has taken responsibility.
    pub confirms: bool,
    /// A message to a queue that does not exist is an error of its sender. (A topic without any group takes messages.)
    pub detects_unroutable: bool,
    /// Consume, produce and acknowledge as one.
    pub transactions: bool,
    /// The most messages one call of the protocol sends, where it has batches.
    pub max_batch_send: Option<usize>,
    /// The most messages one call of the protocol fetches, where it has a limit.
    pub max_batch_receive: Option<usize>,
    /// Wildcards in a consumed topic's name.
    pub wildcards: Option<Wildcards>,
    /// Request and reply.
    pub request_reply: bool,
    /// Messages expire in the broker.
    pub expiry: Support,
    /// Messages with priorities.
    pub priority: bool,
    /// The last message of a topic is kept for new subscribers.
    pub retained: bool,
    /// The most headers, below the common rules.
    pub max_headers: Option<usize>,
    /// The largest body in bytes, if the broker has a bound; the connection's settings may lower it.
    pub max_payload: Option<usize>,
    /// A message is lent for a time and the loan can be extended.
    pub leases: bool,
    /// The broker refuses a second send with the same deduplication id for a while.
    pub deduplication: bool,
    /// Going back to an earlier position.
    pub seek: bool,
    /// Channels are created when they are used.
    pub creates_channels: bool,
    /// Whether a channel exists can be asked without creating it.
    pub lookup: bool,
    /// The broker's channels can be listed.
    pub list: bool,
    /// A queue can be bound to topics, whose messages it gets too.
    pub bindings: bool,
    /// A group takes only some kinds of a topic: the broker delivers no others (native), or polymq acknowledges them unseen
    /// (emulated).
    pub filter: Support,
    /// Number of messages waiting and in flight can be asked for.
    pub stats: bool,
    /// A queue can be emptied.
    pub purge: bool,
    /// Waiting messages can be looked at without taking them.
    pub peek: bool,
    /// Prefetch is bounded in bytes too, not only in messages.
    pub prefetch_bytes: bool,
    /// Encrypted connections.
    pub tls: bool,
    /// Client certificates.
    pub mutual_tls: bool,
}

impl Capabilities {
    /// What both can do: for a stand-in that must not do more than what it stands for.
    #[must_use]
    pub fn limited_to(self, other: &Self) -> Self {
        Self {
            topics: self.topics && other.topics,
            kinds_apart: self.kinds_apart && other.kinds_apart,
            groups: self.groups && other.groups,
            replay: self.replay && other.replay,
            order: self.order.min(other.order),
            requeue: limited(self.requeue, other.requeue),
            delayed_retry: self.delayed_retry.limited_to(other.delayed_retry),
            delayed_send: self.delayed_send.limited_to(other.delayed_send),
            detects_unroutable: self.detects_unroutable && other.detects_unroutable,
            request_reply: self.request_reply && other.request_reply,
            max_headers: [self.max_headers, other.max_headers].into_iter().flatten().min(),
            max_payload: [self.max_payload, other.max_payload].into_iter().flatten().min(),
            lookup: self.lookup && other.lookup,
            list: self.list && other.list,
            bindings: self.bindings && other.bindings,
            filter: limited(self.filter, other.filter),
            stats: self.stats && other.stats,
            purge: self.purge && other.purge,
            peek: self.peek && other.peek,
            ..self
        }
    }

    /// Field names and their values as short words, in order; what `polymq backends` prints.
    #[must_use]
    pub fn table(&self) -> Vec<(String, String)> {
        let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(self) else { return Vec::new() };
        fields.iter().map(|(name, value)| (name.clone(), word(value))).collect()
    }
}

fn word(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::Null => "-".into(),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        Value::String(text) => text.replace('_', " "),
        Value::Object(fields) if fields.contains_key("support") => {
            let support = fields.get("support").map(word).unwrap_or_default();
            match fields.get("max").and_then(|max| max.get("secs")) {
                Some(seconds) => format!("{support}, at most {seconds} s"),
                None => support,
            }
        }
        Value::Object(fields) => {
            fields.values().map(|value| value.as_str().unwrap_or_default()).collect::<Vec<_>>().join(" ")
        }
        other => other.to_string(),
    }
}
