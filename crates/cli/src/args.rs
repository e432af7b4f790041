//! The command line.

use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand};
use polymq::Address;

/// Sends, consumes and checks, on any broker that polymq knows.
#[derive(Debug, Parser)]
#[command(name = "polymq", version, after_help = AFTER_HELP, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(flatten, next_help_heading = "For every command")]
    pub(crate) connection: Connection,

    /// One JSON object a line, for machines.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Writes logs to stderr: a level, or a filter such as "polymq_core=debug".
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

const AFTER_HELP: &str = "\
The broker is chosen by --backend and --url, else by POLYMQ_BACKEND, POLYMQ_URL and POLYMQ_<BACKEND>_<KEY>.

Exit codes:
  0  done
  1  failed: the broker or the message does not allow it
  2  wrong usage
  3  wrong configuration: unknown backend, key or value, or a backend that is not compiled in
  4  cannot connect, or cannot listen
  5  not allowed: wrong credentials or missing permission
  6  no message: nothing came in time, or the queue does not exist";

/// Where the broker is.
#[derive(Debug, ClapArgs)]
pub(crate) struct Connection {
    /// The backend's name; `polymq backends` lists them.
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) backend: Option<String>,

    /// The broker's address. Other users of this machine can see it: put passwords into POLYMQ_URL instead.
    #[arg(long, global = true)]
    pub(crate) url: Option<String>,

    /// A setting of the backend; may be repeated. `polymq backends NAME` lists them.
    #[arg(long, global = true, value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) set: Vec<(String, String)>,

    /// Stands before the name of every channel at the broker, such as an environment: dev.orders.
    #[arg(long, global = true)]
    pub(crate) prefix: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// What the backends of this program can do, or the settings of one.
    Backends(Backends),
    /// Sends messages to a queue or topic and waits until the broker has accepted them.
    Send(Send),
    /// Prints messages and acknowledges what it has printed.
    Consume(Consume),
    /// Connects, sends and receives on a temporary queue, and says what works and what does not; for http, asks the server.
    Check(Check),
    /// Shows the dead letters of a queue or sends them back.
    #[command(subcommand)]
    DeadLetters(DeadLetters),
    /// Lists the broker's channels, or counts the messages of those that are named.
    Channels(Channels),
    /// Prints messages that wait, and takes none.
    Peek(Peek),
    /// Empties a queue and says how many messages are gone.
    Purge(Purge),
    /// Plans or makes queues, topics, groups and bindings.
    #[command(subcommand)]
    Topology(TopologyCommand),
    /// Deletes a queue, a topic or a group of a topic, with the messages.
    Delete(Delete),
    /// Runs a durable broker in this program, until SIGINT or SIGTERM; KubeMQ's SDKs can use it.
    #[cfg(feature = "broker")]
    Broker(Box<crate::broker::Options>),
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Channels {
    /// Only these; needed where the broker cannot list its channels.
    pub(crate) names: Vec<String>,

    /// The names are topics.
    #[arg(long, requires = "names")]
    pub(crate) topic: bool,

    /// The group of the topics.
    #[arg(long, requires = "topic")]
    pub(crate) group: Option<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Peek {
    /// The queue, or with --topic the topic.
    pub(crate) channel: String,

    /// What waits for a group of a topic.
    #[arg(long, requires = "group")]
    pub(crate) topic: bool,

    /// The group of the topic.
    #[arg(long, requires = "topic")]
    pub(crate) group: Option<String>,

    /// At most so many.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max: u32,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Purge {
    /// The queue.
    pub(crate) queue: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TopologyCommand {
    /// Says what is missing and changes nothing.
    Plan(TopologyOf),
    /// Makes what is missing and says what that was.
    Apply(TopologyOf),
}

#[derive(Debug, ClapArgs)]
pub(crate) struct TopologyOf {
    /// A file in TOML: [queues.NAME] with topics = [...] to bind, [topics.NAME] with groups = [...], and options of the backend.
    #[arg(required_unless_present_any = ["queue", "topic", "group"])]
    pub(crate) file: Option<std::path::PathBuf>,

    /// A queue; may be repeated.
    #[arg(long, value_name = "NAME")]
    pub(crate) queue: Vec<String>,

    /// A topic; may be repeated.
    #[arg(long, value_name = "NAME")]
    pub(crate) topic: Vec<String>,

    /// A group of a topic; may be repeated.
    #[arg(long, value_name = "TOPIC@GROUP", value_parser = group)]
    pub(crate) group: Vec<(String, String)>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Delete {
    /// The queue, or with --topic the topic.
    pub(crate) channel: String,

    /// Deletes a topic.
    #[arg(long)]
    pub(crate) topic: bool,

    /// Deletes only this group of the topic.
    #[arg(long, requires = "topic")]
    pub(crate) group: Option<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Backends {
    /// Only this one, with its settings.
    pub(crate) name: Option<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Send {
    /// The queue, or with --topic the topic.
    pub(crate) channel: String,

    /// The body, or `-` to read it from stdin.
    #[arg(required_unless_present_any = ["file", "lines"], conflicts_with_all = ["file", "lines"])]
    pub(crate) body: Option<String>,

    /// Sends a file as the body.
    #[arg(long, value_name = "PATH", conflicts_with = "lines")]
    pub(crate) file: Option<std::path::PathBuf>,

    /// Sends each line of a file as a message of its own; leaves out empty ones.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["count", "id"])]
    pub(crate) lines: Option<std::path::PathBuf>,

    /// Sends to a topic.
    #[arg(long)]
    pub(crate) topic: bool,

    /// The media type of the body; by default what it looks like: JSON, text or bytes.
    #[arg(long, value_name = "TYPE")]
    pub(crate) content_type: Option<String>,

    /// The logical type of the message, such as order.created.
    #[arg(long)]
    pub(crate) kind: Option<String>,

    /// The schema version of the kind.
    #[arg(long, requires = "kind", value_name = "NUMBER")]
    pub(crate) kind_version: Option<u32>,

    /// A header; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub(crate) header: Vec<(String, String)>,

    /// The ordering and partition key.
    #[arg(long)]
    pub(crate) key: Option<String>,

    /// The id; by default a new UUIDv7.
    #[arg(long, conflicts_with = "count")]
    pub(crate) id: Option<String>,

    /// The message is not delivered earlier than this from now.
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub(crate) delay: Option<Duration>,

    /// The message is not handled later than this from now.
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub(crate) expires: Option<Duration>,

    /// Sends so many messages, each with an id of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) count: u32,

    /// Does not create the queue or topic: a missing one is an error.
    #[arg(long)]
    pub(crate) existing: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Consume {
    /// The queue, or with --topic the topic.
    pub(crate) channel: String,

    /// Consumes a topic, with a subscription of its own unless --group is given.
    #[arg(long)]
    pub(crate) topic: bool,

    /// The group of the topic.
    #[arg(long, requires = "topic")]
    pub(crate) group: Option<String>,

    /// Ends after so many messages.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max: Option<u32>,

    /// Ends when no message has come for so long.
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub(crate) timeout: Option<Duration>,

    /// Returns the messages to the broker at the end instead of acknowledging them; needs --max.
    #[arg(long, requires = "max")]
    pub(crate) keep: bool,

    /// Does not create the queue or topic: a missing one is an error.
    #[arg(long)]
    pub(crate) existing: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Check {
    // Longer than backends take to connect by default: they know better what is wrong.
    /// The longest time for each step.
    #[arg(long, value_parser = duration, default_value = "15s", value_name = "DURATION")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeadLetters {
    /// Prints them, with the reasons, and leaves them where they are.
    List {
        #[command(flatten)]
        of: DeadLettersOf,

        /// CHANNEL is a topic: the dead letters of one of its groups.
        #[arg(long, requires = "group")]
        topic: bool,

        /// The group of the topic.
        #[arg(long, requires = "topic")]
        group: Option<String>,
    },
    /// Sends them back to their queue, where they start with the first attempt.
    Replay(DeadLettersOf),
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DeadLettersOf {
    /// Where the messages come from.
    pub(crate) channel: String,

    /// At most so many.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max: u32,

    /// Ends when none has come for so long. By default it ends when it has what waits by the broker's count, or when none
    /// has come for 30s (3s where the broker does not count, and for `list` after the first).
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub(crate) timeout: Option<Duration>,
}

/// A queue, or a topic.
pub(crate) fn address(name: &str, topic: bool) -> Address {
    if topic { Address::topic(name) } else { Address::queue(name) }
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

fn group(text: &str) -> Result<(String, String), String> {
    match text.rsplit_once('@') {
        Some((topic, group)) if !topic.is_empty() && !group.is_empty() => Ok((topic.to_owned(), group.to_owned())),
        _ => Err("expected TOPIC@GROUP".to_owned()),
    }
}

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "expected a duration with its unit, such as 250ms, 5s or 2m".to_owned())
}
