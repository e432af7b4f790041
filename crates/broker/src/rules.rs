//! Who may do what: rules for channels, from a TOML file.
//!
//! ```toml
//! [[rule]]
//! resources = ["queues"]      # events, events_store, commands, queries, queues; left out: all of them
//! client = "billing-.*"       # a regular expression for the whole client id; left out: every client
//! channel = "orders\\..*"     # a regular expression for the whole name of the channel; left out: every channel
//! allow = ["read", "write"]   # what the rule allows
//! ```
//!
//! What no rule allows is refused. The client id is the one of the token when the token has one, else the request's.

use std::path::Path;

use regex::Regex;
use serde::Deserialize;

use crate::error::{BrokerError, Result};

/// What a channel is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Resource {
    Events,
    EventsStore,
    Commands,
    Queries,
    Queues,
}

/// What somebody wants to do with a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Action {
    Read,
    Write,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    rule: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    resources: Option<Vec<Resource>>,
    client: Option<String>,
    channel: Option<String>,
    allow: Vec<Action>,
}

#[derive(Debug)]
struct Rule {
    resources: Option<Vec<Resource>>,
    client: Option<Regex>,
    channel: Option<Regex>,
    allow: Vec<Action>,
}

/// The rules of a file.
#[derive(Debug)]
pub(crate) struct Rules(Vec<Rule>);

impl Rules {
    pub(crate) fn read(file: &Path) -> Result<Self> {
        let wrong = |what: String| BrokerError::Option { file: file.to_owned(), what };
        let text =
            std::fs::read_to_string(file).map_err(|cause| wrong(format!("the rules cannot be read: {cause}")))?;
        let parsed: File = toml::from_str(&text).map_err(|cause| {
            let line = cause.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            wrong(format!("line {line}: {}", cause.message()))
        })?;
        if parsed.rule.is_empty() {
            return Err(wrong(
                "there is no [[rule]]: nobody could do anything; write one, or start without rules".to_owned(),
            ));
        }
        let rules = parsed.rule.into_iter().zip(1..).map(|(entry, number)| {
            let whole = |name: &str, pattern: Option<String>| {
                pattern.map(|pattern| whole(&pattern).map_err(|cause| wrong(format!("rule {number}: {name} = {pattern:?} is not a regular expression: {cause}")))).transpose()
            };
            let (client, channel) = (whole("client", entry.client)?, whole("channel", entry.channel)?);
            if entry.allow.is_empty() {
                return Err(wrong(format!("rule {number}: allow is empty: expected \"read\", \"write\" or both; rules only allow, what none allows is refused")));
            }
            Ok(Rule { resources: entry.resources, client, channel, allow: entry.allow })
        });
        Ok(Self(rules.collect::<Result<_>>()?))
    }

    pub(crate) fn allow(&self, resource: Resource, client: &str, channel: &str, action: Action) -> bool {
        self.0.iter().any(|rule| rule.is_about(resource, Some(client), channel) && rule.allow.contains(&action))
    }

    /// Whether a client may do anything with a channel; one that is not known could be any.
    pub(crate) fn show(&self, resource: Resource, client: Option<&str>, channel: &str) -> bool {
        self.0.iter().any(|rule| rule.is_about(resource, client, channel))
    }
}

impl Rule {
    fn is_about(&self, resource: Resource, client: Option<&str>, channel: &str) -> bool {
        let is_client = |pattern: &Regex| client.is_none_or(|client| pattern.is_match(client));
        self.resources.as_ref().is_none_or(|resources| resources.contains(&resource))
            && self.client.as_ref().is_none_or(is_client)
            && self.channel.as_ref().is_none_or(|pattern| pattern.is_match(channel))
    }
}

fn whole(pattern: &str) -> std::result::Result<Regex, String> {
    // Alone first, so that brackets of the pattern cannot close ours.
    Regex::new(pattern)
        .and_then(|_| Regex::new(&format!("^(?:{pattern})$")))
        .map_err(|cause| cause.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned())
}
