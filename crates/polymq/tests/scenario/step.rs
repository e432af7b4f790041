//! The scenario as data.

use std::{collections::BTreeMap, time::Duration};

use serde::Deserialize;

/// What is in the file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scenario {
    pub(crate) step: Vec<Step>,
}

/// One channel, what is sent to it, and what comes of it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Step {
    pub(crate) name: String,
    pub(crate) messages: Vec<Sent>,
    /// Every message so many times, with a number.
    pub(crate) repeat: usize,
    pub(crate) max_attempts: u32,
    pub(crate) in_place: bool,
    pub(crate) timeout_ms: Option<u64>,
    pub(crate) ordered_by_key: bool,
    pub(crate) concurrency: usize,
    /// How long a handler takes that succeeds.
    pub(crate) takes_ms: u64,
    /// The most messages a handler takes at once.
    pub(crate) batch: Option<usize>,
    /// Handlers start only so long after everything was sent.
    pub(crate) sent_before_start_ms: Option<u64>,
    /// The service is stopped after so many calls, disconnects, and another one goes on.
    pub(crate) stop_after: Option<usize>,
    /// Whether lines tell attempts.
    pub(crate) attempts: bool,
    /// Messages are requests.
    pub(crate) requests: bool,
    /// It is a topic with so many subscriptions of their own.
    pub(crate) listeners: usize,
    /// It is a topic with these groups of so many members.
    pub(crate) groups: BTreeMap<String, usize>,
    /// What comes of it in memory.
    pub(crate) memory: Vec<String>,
    pub(crate) unless: Vec<Unless>,
}

impl Default for Step {
    fn default() -> Self {
        Self {
            name: String::new(),
            messages: Vec::new(),
            repeat: 1,
            max_attempts: 5,
            in_place: false,
            timeout_ms: None,
            ordered_by_key: false,
            concurrency: 1,
            takes_ms: 0,
            batch: None,
            sent_before_start_ms: None,
            stop_after: None,
            attempts: true,
            requests: false,
            listeners: 0,
            groups: BTreeMap::new(),
            memory: Vec::new(),
            unless: Vec::new(),
        }
    }
}

/// A message and what its handler does with it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Sent {
    pub(crate) id: String,
    pub(crate) does: Vec<String>,
    pub(crate) key: Option<String>,
    pub(crate) kind: Option<String>,
    /// Instead of an order.
    pub(crate) body: Option<String>,
    pub(crate) content_type: Option<String>,
    pub(crate) delay_ms: Option<u64>,
    pub(crate) ttl_ms: Option<u64>,
}

/// A difference that a declared capability explains.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Unless {
    pub(crate) capability: String,
    pub(crate) is: Vec<String>,
    /// What else must be declared.
    #[serde(default)]
    pub(crate) also: BTreeMap<String, String>,
    pub(crate) then: Vec<String>,
}

impl Scenario {
    pub(crate) fn read() -> Self {
        let text = include_str!("../../../testkit/scenarios/orders.toml");
        toml::from_str(text).unwrap_or_else(|error| panic!("the scenario: {error}"))
    }
}

impl Step {
    pub(crate) fn channel(&self) -> String {
        format!("x7-{}", self.name)
    }

    pub(crate) fn is_topic(&self) -> bool {
        self.listeners > 0 || !self.groups.is_empty()
    }

    /// Every message, in the order in which they are sent.
    pub(crate) fn all(&self) -> Vec<Sent> {
        let numbered = |number: usize, sent: &Sent| match self.repeat {
            1 => sent.clone(),
            _ => Sent { id: format!("{}-{number}", sent.id), ..sent.clone() },
        };
        (1..=self.repeat).flat_map(|number| self.messages.iter().map(move |sent| numbered(number, sent))).collect()
    }

    /// What is expected of a backend that declares this, and the capability that explains a difference from memory.
    pub(crate) fn expected(&self, declared: &BTreeMap<String, String>) -> (&[String], Option<String>) {
        let explains = |unless: &&Unless| {
            declared.get(&unless.capability).is_some_and(|value| unless.is.contains(value))
                && unless.also.iter().all(|(name, value)| declared.get(name) == Some(value))
        };
        match self.unless.iter().find(explains) {
            Some(unless) => (&unless.then, Some(format!("{}: {}", unless.capability, declared[&unless.capability]))),
            None => (&self.memory, None),
        }
    }
}

pub(crate) fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}
