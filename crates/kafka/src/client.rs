//! The client library's settings, from ours.

use std::{path::Path, sync::Arc, thread, time::Duration};

use polymq_core::{Error, ErrorKind, Result, Secret};
use rdkafka::{
    ClientConfig,
    config::RDKafkaLogLevel,
    producer::{BaseProducer, ProducerContext},
};

use crate::{
    brokers::TOLD_EVERY,
    config::{Compression, KafkaConfig, Mechanism, RECORD_ROOM},
    error,
};

/// How many messages librdkafka keeps fetched ahead of the prefetch.
const MIN_QUEUED: usize = 8_000;
const MAX_QUEUED: usize = 100_000;

/// The longest that librdkafka waits for an answer, and for a connection.
const MAX_SILENCE: Duration = Duration::from_secs(300);
const MAX_SETUP: Duration = Duration::from_millis(i32::MAX as u64);

fn millis(duration: Duration) -> String {
    duration.as_millis().to_string()
}

fn linger(duration: Duration) -> String {
    (duration.as_secs_f64() * 1000.0).to_string()
}

/// What every client of a connection has in common.
pub(crate) fn common(config: &KafkaConfig) -> Result<ClientConfig> {
    let endpoint = config.endpoint()?;
    let mut client = ClientConfig::new();
    let protocol = match (endpoint.tls, endpoint.user.is_some()) {
        (false, false) => "plaintext",
        (false, true) => "sasl_plaintext",
        (true, false) => "ssl",
        (true, true) => "sasl_ssl",
    };
    client
        .set("bootstrap.servers", endpoint.servers())
        .set("client.id", &config.name)
        .set("security.protocol", protocol)
        .set("reconnect.backoff.ms", millis(config.reconnect_initial))
        .set("reconnect.backoff.max.ms", millis(config.reconnect_max))
        .set(
            "socket.connection.setup.timeout.ms",
            millis(config.connect_timeout.clamp(Duration::from_secs(1), MAX_SETUP)),
        )
        // A request without an answer: the connection is dead, and another one may not be.
        .set("socket.timeout.ms", millis((config.heartbeat * 2).clamp(Duration::from_secs(3), MAX_SILENCE)))
        .set("socket.keepalive.enable", "true")
        .set("socket.nagle.disable", "true")
        // Topics are declared before they are used; one that is not there is soon known.
        .set("topic.metadata.propagation.max.ms", "1000")
        // Neither is one made by a broker that makes what it is asked about: a question is no declaration.
        .set("allow.auto.create.topics", "false")
        .set_log_level(RDKafkaLogLevel::Info);
    if let Some(user) = &endpoint.user {
        let mechanism = match config.mechanism {
            Mechanism::Plain => "PLAIN",
            Mechanism::ScramSha256 => "SCRAM-SHA-256",
            Mechanism::ScramSha512 => "SCRAM-SHA-512",
        };
        client
            .set("sasl.mechanism", mechanism)
            .set("sasl.username", user)
            .set("sasl.password", endpoint.pass.as_ref().map_or("", Secret::expose));
    }
    let files = [
        ("ssl.ca.location", "ca_file", &config.ca_file),
        ("ssl.certificate.location", "cert_file", &config.cert_file),
        ("ssl.key.location", "key_file", &config.key_file),
    ];
    for (name, key, file) in files {
        if let Some(file) = file {
            client.set(name, path(key, file)?);
        }
    }
    if let Some(pass) = &config.key_pass {
        client.set("ssl.key.password", pass.expose());
    }
    for (name, value) in config.options()? {
        client.set(name, value);
    }
    Ok(client)
}

/// The path of a PEM file, which has to be one: what the client library says of it names its own settings.
fn path<'a>(key: &str, file: &'a Path) -> Result<&'a str> {
    let problem = match std::fs::read_to_string(file) {
        Ok(text) if text.contains(if key == "key_file" { "PRIVATE KEY" } else { "BEGIN CERTIFICATE" }) => None,
        Ok(_) if key == "key_file" => Some("has no private key in it".to_owned()),
        Ok(_) => Some("has no certificate in it".to_owned()),
        Err(error) => Some(format!("cannot be read: {error}")),
    };
    match (problem, file.to_str()) {
        (None, Some(path)) => Ok(path),
        (None, None) => Err(error::config(format!("setting {key:?}: the path is no UTF-8"))),
        (Some(problem), _) => Err(error::config(format!("setting {key:?}: {} {problem}", file.display()))),
    }
}

/// A client tells what brokers it knows, unless somebody has chosen how often.
fn tell_brokers(client: &mut ClientConfig) {
    if client.get("statistics.interval.ms").is_none() {
        client.set("statistics.interval.ms", millis(TOLD_EVERY));
    }
}

/// The client that sends.
pub(crate) fn producer(config: &KafkaConfig) -> Result<ClientConfig> {
    let compression = match config.compression {
        Compression::None => "none",
        Compression::Lz4 => "lz4",
        Compression::Snappy => "snappy",
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
    };
    let mut client = common(config)?;
    tell_brokers(&mut client);
    client
        // Brings acks=all, retries without end within the delivery time-out, and an order that survives them.
        .set("enable.idempotence", "true")
        .set("delivery.timeout.ms", millis(config.delivery_timeout))
        .set("linger.ms", linger(config.linger))
        .set("compression.type", compression)
        .set("message.max.bytes", (config.max_payload + RECORD_ROOM).to_string())
        // As other clients of Kafka do it: the same key is in the same partition, whoever sends it.
        .set("partitioner", "murmur2_random")
        // The window of the channel is the bound; a second one here would have to be waited for.
        .set("queue.buffering.max.messages", "0")
        .set("queue.buffering.max.kbytes", i32::MAX.to_string());
    Ok(client)
}

/// The client that writes transactions.
pub(crate) fn transactional(config: &KafkaConfig, id: &str) -> Result<ClientConfig> {
    let mut client = producer(config)?;
    // When this process is killed, others wait for so long for the positions that it was about to commit.
    let timeout = config.session_timeout;
    let delivery = config.delivery_timeout.min(timeout);
    client
        .set("transactional.id", id)
        .set("transaction.timeout.ms", millis(timeout))
        // Longer is refused by the client library.
        .set("socket.timeout.ms", millis((config.heartbeat * 2).clamp(Duration::from_millis(500), timeout)))
        .set("delivery.timeout.ms", millis(delivery))
        // As long is refused too.
        .set("linger.ms", linger(config.linger.min(delivery / 2)));
    Ok(client)
}

/// A client that receives, as a member of `group` or, without one, on its own.
pub(crate) fn consumer(config: &KafkaConfig, group: &str, prefetch: usize, bytes: usize) -> Result<ClientConfig> {
    let mut client = common(config)?;
    tell_brokers(&mut client);
    let session = config.session_timeout;
    // librdkafka has a buffer of its own before ours: a fraction of what may be fetched, and never much.
    let kilobytes = (bytes / 1024 / 4).clamp(64, 8 * 1024);
    client
        .set("group.id", group)
        .set("session.timeout.ms", millis(session))
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        // Where a group begins is committed before it begins; what has no position is new, such as a new partition.
        .set("auto.offset.reset", "earliest");
    let heartbeat = (session / 10).clamp(Duration::from_millis(100), Duration::from_secs(3));
    for (name, value) in [
        // Other members wait for this one to notice that they have come.
        ("heartbeat.interval.ms", millis(heartbeat)),
        ("max.poll.interval.ms", millis(session.max(Duration::from_secs(300)))),
        // Enough that a fast handler never waits for a request that is on its way, whatever the prefetch is; each
        // takes some hundred bytes beside its body.
        ("queued.min.messages", prefetch.saturating_mul(4).clamp(MIN_QUEUED, MAX_QUEUED).to_string()),
        ("queued.max.messages.kbytes", kilobytes.to_string()),
        // How often a full buffer is looked at. A fast handler empties it in less than librdkafka's own second.
        ("fetch.queue.backoff.ms", "2".to_owned()),
        // A fetch asks a broker for whatever has room, and there is one at a time: while the busy partitions have enough
        // here, it asks for those that nothing comes in alone, and waits for so long.
        ("fetch.wait.max.ms", "50".to_owned()),
        ("receive.message.max.bytes", (config.max_payload + 64 * 1024 * 1024).to_string()),
    ] {
        // What somebody has chosen among the options stays.
        if client.get(name).is_none() {
            client.set(name, value);
        }
    }
    Ok(client)
}

/// How long a thread waits for the reports of a client before it looks whether anybody still has it. The binding turns
/// round without a pause in the last millisecond of each wait, so rdkafka's own tenth of a second costs a percent of a processor.
const LOOK: Duration = Duration::from_secs(1);

/// Takes the reports of a client that sends, in a thread, for as long as somebody else has it.
pub(crate) fn served<C: ProducerContext + 'static>(native: BaseProducer<C>) -> Result<Arc<BaseProducer<C>>> {
    let native = Arc::new(native);
    let ours = Arc::clone(&native);
    let serve = move || {
        while Arc::strong_count(&ours) > 1 {
            ours.poll(LOOK);
        }
        // What was withdrawn at the end is answered.
        ours.poll(Duration::ZERO);
    };
    let spawned = thread::Builder::new().name("polymq-kafka-reports".into()).spawn(serve);
    spawned.map_err(|error| Error::new(ErrorKind::Other, "no thread can be started").with_source(error))?;
    Ok(native)
}

/// Lines of the client library.
pub(crate) fn log(level: RDKafkaLogLevel, facility: &str, line: &str) {
    // What is wrong is told through errors and health; these lines are for those who look closer.
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error => {
            tracing::info!(facility, "{line}");
        }
        _ => tracing::debug!(facility, "{line}"),
    }
}

#[cfg(test)]
mod tests {
    use polymq_core::Settings;
    use rdkafka::consumer::BaseConsumer;

    use super::*;

    /// What is accepted as a setting is accepted by the client library too.
    #[test]
    fn the_bounds_of_settings_are_those_of_every_client() {
        for settings in [
            Settings::new().with("heartbeat", "1s").with("session_timeout", "1s").with("linger", "500ms"),
            Settings::new().with("heartbeat", "1h").with("session_timeout", "5m").with("linger", "1m"),
            Settings::new().with("session_timeout", "10s").with("linger", "1m"),
            Settings::new().with("delivery_timeout", "1s").with("linger", "999ms"),
            Settings::new().with("delivery_timeout", "1d").with("connect_timeout", "1000d"),
            Settings::new().with("reconnect_initial", "1h").with("reconnect_max", "1h"),
            Settings::new().with("max_payload", "900000000"),
        ] {
            let config = KafkaConfig::parse(&settings).expect("valid");
            for sending in [producer(&config), transactional(&config, "id")] {
                let made: Result<BaseProducer, _> = sending.expect("settings").create();
                made.unwrap_or_else(|error| panic!("{settings:?}: {error}"));
            }
            let made: Result<BaseConsumer, _> = consumer(&config, "group", 1, 1).expect("settings").create();
            made.unwrap_or_else(|error| panic!("{settings:?}: {error}"));
        }
    }
}
