//! Health, readiness and metrics over HTTP.

use std::{collections::BTreeMap, fmt::Write, net::SocketAddr};

use axum::{Json, Router, extract::State, http::StatusCode, routing::get};
use serde_json::{Value, json};

use super::{RouteStats, Running};
use crate::{Error, ErrorKind, Result, SendStats};

/// Serves until the service stops; tells where.
pub(super) async fn serve(running: &Running, address: SocketAddr) -> Result<SocketAddr> {
    let cannot = |error: std::io::Error| {
        Error::new(ErrorKind::Config, format!("health and metrics cannot be served on {address}: {error}"))
            .with_operation("start")
            .with_hint("choose a free address")
            .with_source(error)
    };
    let listener = tokio::net::TcpListener::bind(address).await.map_err(cannot)?;
    let bound = listener.local_addr().map_err(cannot)?;
    let stop = running.signal().clone();
    let router = Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(running.clone());
    tokio::spawn(async move {
        let serving = axum::serve(listener, router).with_graceful_shutdown(async move { stop.said().await });
        if let Err(error) = serving.await {
            tracing::error!(%error, "health and metrics are not served any more");
        }
    });
    Ok(bound)
}

/// The process lives; what its connections do is told.
async fn health(State(running): State<Running>) -> Json<Value> {
    Json(report(&running))
}

/// 200 while it takes work, 503 otherwise.
async fn ready(State(running): State<Running>) -> (StatusCode, Json<Value>) {
    let status = if running.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(report(&running)))
}

fn report(running: &Running) -> Value {
    let connections: Vec<Value> = running
        .buses()
        .iter()
        .map(|bus| {
            let health = bus.health();
            let sent: BTreeMap<_, _> = bus.sent().into_iter().map(|(to, stats)| (to.to_string(), stats)).collect();
            json!({
                "backend": bus.backend(),
                "state": health.state,
                "reason": health.reason.as_deref(),
                "reconnects": health.reconnects,
                "sent": sent,
            })
        })
        .collect();
    json!({ "ready": running.is_ready(), "connections": connections, "subscriptions": running.all_stats() })
}

/// Prometheus' text format, version 0.0.4.
async fn metrics(State(running): State<Running>) -> String {
    let mut text = String::new();
    let stats = running.all_stats();
    let stats: Vec<_> = stats.iter().map(|(name, stats)| (labels(&[("subscription", name)]), stats)).collect();
    let mut family = |name, kind, read: fn(&RouteStats) -> u64| {
        write_family(&mut text, name, kind, stats.iter().map(|(labels, stats)| (labels, read(stats))));
    };
    family("handled_total", "counter", |stats| stats.handled);
    family("failed_total", "counter", |stats| stats.failed);
    family("retried_total", "counter", |stats| stats.retried);
    family("deferred_total", "counter", |stats| stats.deferred);
    family("dead_lettered_total", "counter", |stats| stats.dead_lettered);
    family("dropped_total", "counter", |stats| stats.dropped);
    family("undecodable_total", "counter", |stats| stats.undecodable);
    family("untrusted_total", "counter", |stats| stats.untrusted);
    family("expired_total", "counter", |stats| stats.expired);
    family("unwanted_total", "counter", |stats| stats.unwanted);
    family("panicked_total", "counter", |stats| stats.panicked);
    family("timed_out_total", "counter", |stats| stats.timed_out);
    family("paused", "gauge", |stats| u64::from(stats.paused));

    let sent = sent(&running);
    let mut family = |name, read: fn(&SendStats) -> u64| {
        write_family(&mut text, name, "counter", sent.iter().map(|(labels, stats)| (labels, read(stats))));
    };
    family("sent_total", |stats| stats.accepted);
    family("send_failed_total", |stats| stats.failed);
    family("send_unknown_total", |stats| stats.unknown);
    text
}

/// What was sent, by labels. Two connections to one backend may send to channels of one name: they are one here.
fn sent(running: &Running) -> BTreeMap<String, SendStats> {
    let mut sent = BTreeMap::<_, SendStats>::new();
    for bus in running.buses() {
        for (address, stats) in bus.sent() {
            let kind = address.kind().to_string();
            let labels = labels(&[("backend", bus.backend()), ("kind", &kind), ("channel", address.name())]);
            *sent.entry(labels).or_default() += stats;
        }
    }
    sent
}

fn labels(labels: &[(&str, &str)]) -> String {
    let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    labels.join(",")
}

fn write_family<'a>(text: &mut String, name: &str, kind: &str, values: impl Iterator<Item = (&'a String, u64)>) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "# TYPE polymq_{name} {kind}");
    for (labels, value) in values {
        let _ = writeln!(text, "polymq_{name}{{{labels}}} {value}");
    }
}
