//! Health, readiness and metrics over HTTP.

use std::{fmt::Write, net::SocketAddr};

use axum::{Json, Router, extract::State, http::StatusCode, routing::get};
use serde_json::{Value, json};

use super::Running;
use crate::{Error, ErrorKind, Result};

/// Serves until the service stops.
pub(super) async fn serve(running: &Running, address: SocketAddr) -> Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await.map_err(|error| {
        Error::new(ErrorKind::Config, format!("health and metrics cannot be served on {address}: {error}"))
            .with_operation("start")
            .with_hint("choose a free address")
            .with_source(error)
    })?;
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
    Ok(())
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
            json!({
                "backend": bus.backend(),
                "state": health.state,
                "reason": health.reason.as_deref(),
                "reconnects": health.reconnects,
            })
        })
        .collect();
    json!({ "ready": running.is_ready(), "connections": connections, "subscriptions": running.all_stats() })
}

/// Prometheus' text format, version 0.0.4.
async fn metrics(State(running): State<Running>) -> String {
    let stats = running.all_stats();
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, read: &dyn Fn(&super::RouteStats) -> u64| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# TYPE polymq_{name} {kind}");
        for (subscription, stats) in &stats {
            let label = subscription.replace('\\', "\\\\").replace('"', "\\\"");
            let _ = writeln!(text, "polymq_{name}{{subscription=\"{label}\"}} {}", read(stats));
        }
    };
    family("handled_total", "counter", &|stats| stats.handled);
    family("failed_total", "counter", &|stats| stats.failed);
    family("retried_total", "counter", &|stats| stats.retried);
    family("deferred_total", "counter", &|stats| stats.deferred);
    family("dead_lettered_total", "counter", &|stats| stats.dead_lettered);
    family("dropped_total", "counter", &|stats| stats.dropped);
    family("undecodable_total", "counter", &|stats| stats.undecodable);
    family("expired_total", "counter", &|stats| stats.expired);
    family("unwanted_total", "counter", &|stats| stats.unwanted);
    family("panicked_total", "counter", &|stats| stats.panicked);
    family("timed_out_total", "counter", &|stats| stats.timed_out);
    family("paused", "gauge", &|stats| u64::from(stats.paused));
    text
}
