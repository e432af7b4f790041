//! The client library's settings, from ours.

use std::{path::Path, time::Duration};

use polymq_core::{Result, Secret};
use rdkafka::{ClientConfig, config::RDKafkaLogLevel};

use crate::{
    config::{Compression, KafkaConfig, Mechanism, RECORD_ROOM},
    error,
};

fn millis(duration: Duration) -> String {
    duration.as_millis().to_string()
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
        .set("socket.connection.setup.timeout.ms", millis(config.connect_timeout.max(Duration::from_secs(1))))
        // A request without an answer: the connection is dead, and another one may not be.
        .set("socket.timeout.ms", millis((config.heartbeat * 2).max(Duration::from_secs(3))))
        .set("socket.keepalive.enable", "true")
        .set("socket.nagle.disable", "true")
        // Topics are declared before they are used; one that is not there is soon known.
        .set("topic.metadata.propagation.max.ms", "1000")
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
        ("ssl.ca.location", &config.ca_file),
        ("ssl.certificate.location", &config.cert_file),
        ("ssl.key.location", &config.key_file),
    ];
    for (name, file) in files {
        if let Some(file) = file {
            client.set(name, path(file)?);
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

fn path(file: &Path) -> Result<&str> {
    file.to_str().ok_or_else(|| error::config("the path of a certificate or key is no UTF-8"))
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
    client
        // Brings acks=all, retries without end within the delivery time-out, and an order that survives them.
        .set("enable.idempotence", "true")
        .set("delivery.timeout.ms", millis(config.delivery_timeout))
        .set("linger.ms", (config.linger.as_secs_f64() * 1000.0).to_string())
        .set("compression.type", compression)
        .set("message.max.bytes", (config.max_payload + RECORD_ROOM).to_string())
        // As other clients of Kafka do it: the same key is in the same partition, whoever sends it.
        .set("partitioner", "murmur2_random")
        // The window of the channel is the bound; a second one here would have to be waited for.
        .set("queue.buffering.max.messages", "0")
        .set("queue.buffering.max.kbytes", i32::MAX.to_string());
    Ok(client)
}

/// A client that receives, as a member of `group` or, without one, on its own.
pub(crate) fn consumer(config: &KafkaConfig, group: &str, prefetch: usize, bytes: usize) -> Result<ClientConfig> {
    let mut client = common(config)?;
    let session = config.session_timeout;
    // librdkafka has a buffer of its own before ours: a fraction of what may be fetched, and never much.
    let kilobytes = (bytes / 1024 / 4).clamp(64, 8 * 1024);
    client
        .set("group.id", group)
        .set("session.timeout.ms", millis(session))
        // Other members wait for this one to notice that they have come.
        .set("heartbeat.interval.ms", millis((session / 10).clamp(Duration::from_millis(100), Duration::from_secs(3))))
        .set("max.poll.interval.ms", millis(session.max(Duration::from_secs(300))))
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        // Where a group begins is committed before it begins; what has no position is new, such as a new partition.
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "false")
        // More than the prefetch, or each request to the broker brings little; its bytes are the bound.
        .set("queued.min.messages", (prefetch.saturating_mul(10)).clamp(1, 100_000).to_string())
        .set("queued.max.messages.kbytes", kilobytes.to_string())
        .set("fetch.queue.backoff.ms", "10")
        .set("receive.message.max.bytes", (config.max_payload + 64 * 1024 * 1024).to_string());
    Ok(client)
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
