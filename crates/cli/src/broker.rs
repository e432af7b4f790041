//! `polymq broker`: a durable broker in this program, until it is told to stop.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use etcetera::BaseStrategy;
use polymq_broker::{Broker, BrokerError, Builder, Limits, TokenAlgorithm};
use serde_json::json;

use crate::{
    args::{Connection, duration},
    commands::interrupted,
    exit::{Exit, Failed},
    output::Output,
};

/// Bytes that the broker keeps in memory until they are on disk: no message can have more.
const MOST_BYTES: u64 = 128 << 20;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Options {
    /// The folder of what must survive; made when it is not there. Default: polymq/broker in the user's data folder.
    #[arg(long, value_name = "DIR", conflicts_with = "memory")]
    data_dir: Option<PathBuf>,

    /// Keeps everything in memory: it is gone with the broker.
    #[arg(long)]
    memory: bool,

    /// Where to listen; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50000", value_parser = address)]
    listen: String,

    /// Serves /health/live, /health/ready and /metrics over HTTP there, to everybody who reaches it.
    #[arg(long, value_name = "HOST:PORT", value_parser = address)]
    http: Option<String>,

    /// How long a stop waits for connections to end by themselves.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    drain: Duration,

    #[command(flatten, next_help_heading = "Security; SIGHUP reads the files anew")]
    security: Security,

    #[command(flatten, next_help_heading = "Limits: what is beyond is refused")]
    limits: Most,
}

const AFTER_HELP: &str = "\
--backend, --url, --set and --prefix are for the other commands and refused here.

It prints one line when it listens. SIGINT or SIGTERM: takes no further calls, gives back what is lent, writes what
was accepted, and ends with 0; a second signal ends it at once. Logs go to stderr from level warn on; see --log.

The user's data folder is $XDG_DATA_HOME or ~/.local/share, and %APPDATA% on Windows.

Exit codes:
  0  stopped as asked
  1  failed: the data folder cannot be used, its data are damaged, the disk fails, or a second signal came
  2  wrong usage
  3  wrong configuration: a file that an option names cannot be used
  4  cannot listen: the address is taken or not of this machine
  5  not allowed: listening there needs a permission";

#[derive(Debug, Args)]
struct Security {
    /// Serves with TLS only: PEM file of the certificate and its chain.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// PEM file of the certificate's key.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// PEM file of the authorities whose certificates clients must show.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    client_ca: Option<PathBuf>,

    /// Asks for JSON web tokens: file of the secret (HS...) or of the public key as PEM (RS..., ES...).
    #[arg(long, value_name = "FILE", requires = "token_algorithm")]
    token_key: Option<PathBuf>,

    /// How tokens are signed: HS256, HS384, HS512, RS256, RS384, RS512, ES256, ES384 or ES512.
    #[arg(long, value_name = "NAME", requires = "token_key")]
    token_algorithm: Option<TokenAlgorithm>,

    /// TOML file of who may do what with which channels.
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,
}

impl Security {
    /// Whether a stranger who reaches the broker can do nothing.
    fn knows_clients(&self) -> bool {
        self.client_ca.is_some() || self.token_key.is_some()
    }

    fn give(self, mut builder: Builder) -> Builder {
        if let (Some(certificate), Some(key)) = (self.tls_cert, self.tls_key) {
            builder = builder.tls(certificate, key);
        }
        if let Some(file) = self.client_ca {
            builder = builder.client_ca(file);
        }
        if let (Some(algorithm), Some(file)) = (self.token_algorithm, self.token_key) {
            builder = builder.token_key(algorithm, file);
        }
        if let Some(file) = self.rules {
            builder = builder.rules(file);
        }
        builder
    }
}

#[derive(Debug, Args)]
struct Most {
    /// Messages of one receive.
    #[arg(long, value_name = "COUNT", default_value_t = 1024, value_parser = count)]
    max_receive: u32,

    /// Wait of a receive.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration)]
    max_wait: Duration,

    /// Time after which a message expires.
    #[arg(long, value_name = "DURATION", default_value = "12h", value_parser = duration)]
    max_expiration: Duration,

    /// Delay of a message.
    #[arg(long, value_name = "DURATION", default_value = "12h", value_parser = duration)]
    max_delay: Duration,

    /// Time for which a transaction holds a message.
    #[arg(long, value_name = "DURATION", default_value = "12h", value_parser = duration)]
    max_visibility: Duration,

    /// Deliveries of a message, also of one that asks for no limit.
    #[arg(long, value_name = "COUNT", default_value_t = 1024, value_parser = count)]
    max_receive_count: u32,

    /// Bytes of a message; 128MiB at most.
    #[arg(long, value_name = "BYTES", default_value = "100MiB", value_parser = bytes)]
    max_message: usize,

    /// Connections at a time.
    #[arg(long, value_name = "COUNT", default_value_t = 10_000, value_parser = count)]
    max_connections: u32,

    /// Calls and streams of one connection at a time; more wait.
    #[arg(long, value_name = "COUNT", default_value_t = 2_000, value_parser = count)]
    max_streams: u32,

    /// Queues, and as many channels of stored events.
    #[arg(long, value_name = "COUNT", default_value_t = 100_000, value_parser = count)]
    max_channels: u32,

    /// Messages of a queue. Default: any number.
    #[arg(long, value_name = "COUNT")]
    max_queue_messages: Option<u64>,

    /// Bytes of a queue. Default: any number.
    #[arg(long, value_name = "BYTES", value_parser = size)]
    max_queue_size: Option<u64>,

    /// Bytes of everything that is stored. Default: what the disk has.
    #[arg(long, value_name = "BYTES", value_parser = size)]
    max_store: Option<u64>,

    /// Bytes of the disk that are kept free for settling.
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = size)]
    keep_free: u64,

    /// How long stored events are kept; "forever" for no limit.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = age)]
    keep_events: Age,

    /// Stored events of a channel that are kept. Default: any number.
    #[arg(long, value_name = "COUNT")]
    keep_events_count: Option<u64>,

    /// Bytes of a channel's stored events that are kept. Default: any number.
    #[arg(long, value_name = "BYTES", value_parser = size)]
    keep_events_size: Option<u64>,

    /// How long the place of a reader that stays away is kept; "forever" for no limit.
    #[arg(long, value_name = "DURATION", default_value = "30days", value_parser = age)]
    keep_readers: Age,

    /// Bytes of messages in one answer; one message may have more.
    #[arg(long, value_name = "BYTES", default_value = "4032KiB", value_parser = size)]
    max_answer: u64,

    /// Messages that one stream of polls may hold unsettled.
    #[arg(long, value_name = "COUNT", default_value_t = 100_000, value_parser = count)]
    max_held: u32,

    /// Bytes of messages that one stream of polls may hold unsettled.
    #[arg(long, value_name = "BYTES", default_value = "256MiB", value_parser = size)]
    max_held_size: u64,

    /// Bytes that wait for one slow subscriber.
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = size)]
    max_waiting: u64,

    /// Bytes of cached answers to queries.
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = size)]
    max_cache: u64,

    /// Bytes of requests of all connections that come in or are worked on.
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = size)]
    max_requests_size: u64,

    /// How long the rest of a request may stay away of which a part has come, when half of --max-requests-size is taken.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    request_idle: Duration,
}

/// How long something is kept; `None` is for ever.
#[derive(Debug, Clone)]
struct Age(Option<Duration>);

fn age(text: &str) -> Result<Age, String> {
    if text == "forever" { Ok(Age(None)) } else { duration(text).map(|age| Age(Some(age))) }
}

fn size(text: &str) -> Result<u64, String> {
    let size = text.parse::<bytesize::ByteSize>().ok().map(|size| size.as_u64()).filter(|size| *size > 0);
    size.ok_or_else(|| "expected a size, such as 64KiB, 100MiB or 20GiB".to_owned())
}

fn number(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

impl From<Most> for Limits {
    fn from(most: Most) -> Self {
        Self {
            receive: most.max_receive as usize,
            wait: most.max_wait,
            expiration: most.max_expiration,
            delay: most.max_delay,
            visibility: most.max_visibility,
            receive_count: most.max_receive_count.cast_signed(),
            message: most.max_message,
            connections: most.max_connections as usize,
            streams: most.max_streams,
            channels: most.max_channels as usize,
            queue_count: most.max_queue_messages,
            queue_bytes: most.max_queue_size,
            store_bytes: most.max_store,
            free_disk: most.keep_free,
            event_age: most.keep_events.0,
            event_count: most.keep_events_count,
            event_bytes: most.keep_events_size,
            reader_age: most.keep_readers.0,
            answer: number(most.max_answer),
            held_count: most.max_held as usize,
            held_bytes: number(most.max_held_size),
            waiting: number(most.max_waiting),
            cache: number(most.max_cache),
            requests: number(most.max_requests_size),
            request_idle: most.request_idle,
        }
    }
}

pub(crate) async fn run(connection: &Connection, options: Options, output: &Output) -> Result<Exit, Failed> {
    if let Some(option) = connection.given() {
        let sentence = format!(
            "{option} says how to reach a broker, and this command is one: leave it out; see polymq broker --help"
        );
        return Err(Failed::new(Exit::Usage, sentence));
    }
    let folder = if options.memory { None } else { Some(folder(options.data_dir)?) };
    let known = options.security.knows_clients();
    let builder = Broker::builder().listen(options.listen).limits(options.limits.into()).drain(options.drain);
    let mut builder = options.security.give(builder);
    if let Some(address) = options.http {
        builder = builder.http(address);
    }
    if let Some(folder) = &folder {
        builder = builder.data_dir(folder);
    }
    // Before the line is printed: who reads it may send a signal at once.
    let (asked, hangups) = (interrupted(), hangups());
    let broker = builder.start().await?;
    let address = broker.address();
    // A broker whose starter has gone away goes on.
    let http = broker.http_address();
    let _ = output.say(
        || {
            let data = folder.as_ref().map_or("in memory".to_owned(), |folder| format!("data in {}", folder.display()));
            let http = http.map_or_else(String::new, |http| format!(", health and metrics at http://{http}"));
            format!("listening on {address}, {data}{http}")
        },
        || {
            let mut said = json!({ "listening": address.to_string(), "data_dir": folder });
            if let Some(http) = http {
                said["http"] = http.to_string().into();
            }
            said
        },
    );
    if !address.ip().is_loopback() && !known {
        output.note("everybody who reaches this address can read and write");
    }
    tokio::select! {
        () = asked => {}
        () = reloads(&broker, hangups) => {}
        cause = broker.failed() => return Err(cause.into()),
    }
    tokio::select! {
        failure = broker.stop() => failure.map_or(Ok(Exit::Done), |cause| Err(cause.into())),
        () = interrupted() => Err(Failed::new(Exit::Failed, "ended at once by a second signal; what was accepted is on disk")),
    }
}

/// SIGHUP, listened to from now on; where there is none, it never comes.
#[cfg(unix)]
fn hangups() -> Option<tokio::signal::unix::Signal> {
    tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).ok()
}

#[cfg(not(unix))]
fn hangups() -> Option<std::convert::Infallible> {
    None
}

/// Reads the files of security anew whenever SIGHUP says so. The broker logs how it went.
#[cfg(unix)]
async fn reloads(broker: &Broker, hangups: Option<tokio::signal::unix::Signal>) {
    if let Some(mut hangups) = hangups {
        while hangups.recv().await.is_some() {
            let _ = broker.reload().await;
        }
    }
    std::future::pending().await
}

#[cfg(not(unix))]
async fn reloads(_: &Broker, _: Option<std::convert::Infallible>) {
    std::future::pending().await
}

fn folder(asked: Option<PathBuf>) -> Result<PathBuf, Failed> {
    if let Some(folder) = asked {
        return Ok(folder);
    }
    let strategy = etcetera::choose_base_strategy().map_err(|_| {
        Failed::new(Exit::Usage, "this user has no home folder to keep data in: say --data-dir DIR, or --memory")
    })?;
    Ok(strategy.data_dir().join("polymq").join("broker"))
}

impl From<BrokerError> for Failed {
    fn from(error: BrokerError) -> Self {
        let exit = match &error {
            BrokerError::Listen { cause, .. } if cause.kind() == std::io::ErrorKind::PermissionDenied => {
                Exit::NotAllowed
            }
            BrokerError::Listen { .. } => Exit::Connection,
            BrokerError::Option { .. } => Exit::Configuration,
            _ => Exit::Failed,
        };
        Self::new(exit, error.to_string())
    }
}

fn address(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(text.to_owned()),
        _ => Err("expected HOST:PORT, such as 127.0.0.1:50000 or [::]:50000".to_owned()),
    }
}

fn count(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| (1..=i32::MAX.cast_unsigned()).contains(number));
    number.ok_or_else(|| format!("expected a number from 1 to {}", i32::MAX))
}

fn bytes(text: &str) -> Result<usize, String> {
    let size = text.parse::<bytesize::ByteSize>().ok().filter(|size| (1..=MOST_BYTES).contains(&size.as_u64()));
    size.and_then(|size| usize::try_from(size.as_u64()).ok())
        .ok_or_else(|| "expected a size of 1 to 128MiB, such as 4096, 64KiB or 100MiB".to_owned())
}
