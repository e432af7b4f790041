//! Mutants that lie about themselves, lose the thread, and tell what they should keep to themselves.

use std::sync::Arc;

use async_trait::async_trait;
use polymq_core::{
    Backend, Completion, Connection, Error, HealthReporter, HealthWatch, Message, Receipt, Result, Settings, Token,
};

use super::{Mutant, mutant};
use crate::twist::{Receiving, Sending, Twist};

pub(super) const MUTANTS: &[Mutant] = &[
    mutant("is_always_down", || Arc::new(AlwaysDown(HealthReporter::new())), &["X1_health_without_a_fault"]),
    mutant("begins_new_traces", || Arc::new(BeginsNewTraces), CONTEXT),
    mutant("retries_without_headers", || Arc::new(RetriesBare), &["X2_context_survives_retries"]),
    mutant("logs_bodies", || Arc::new(LogsBodies), &["X4_nothing_secret_is_told"]),
    mutant("names_the_password", || Arc::new(NamesThePassword), &["X4_nothing_secret_is_told"]),
];

const CONTEXT: &[&str] = &[
    "X2_context_survives_dead_letters",
    "X2_context_survives_batches",
    "X2_context_survives_a_bridge",
    "X2_context_reaches_replies",
];

#[derive(Debug)]
struct AlwaysDown(HealthReporter);

impl Twist for AlwaysDown {
    fn health(&self, _: HealthWatch) -> HealthWatch {
        self.0.down("so it says");
        self.0.watch()
    }
}

#[derive(Debug)]
struct BeginsNewTraces;

impl Twist for BeginsNewTraces {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        let mut headers = message.headers().clone();
        if headers.remove("traceparent").is_some() {
            headers.insert("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        }
        at.producer.send(message.with_headers(headers))
    }
}

#[derive(Debug)]
struct RetriesBare;

impl Twist for RetriesBare {
    fn retry(
        &self,
        at: &Receiving,
        token: Token,
        message: &Message,
        attempt: u32,
        after: std::time::Duration,
    ) -> Completion<()> {
        let bare = message.clone().with_headers(polymq_core::Headers::new());
        at.settler.retry(token, &bare, attempt, after)
    }
}

#[derive(Debug)]
struct LogsBodies;

impl Twist for LogsBodies {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        tracing::trace!(body = ?message.payload(), "sending");
        at.producer.send(message)
    }
}

fn named(error: Error, settings: &Settings) -> Error {
    Error::new(error.kind(), format!("cannot connect to {}", settings.get("url").unwrap_or_default()))
}

#[derive(Debug)]
struct NamesThePassword;

#[async_trait]
impl Twist for NamesThePassword {
    fn check(&self, backend: &dyn Backend, settings: &Settings) -> Result<()> {
        backend.check(settings).map_err(|error| named(error, settings))
    }

    async fn connect(&self, backend: &dyn Backend, settings: &Settings) -> Result<Arc<dyn Connection>> {
        backend.connect(settings).await.map_err(|error| named(error, settings))
    }
}
