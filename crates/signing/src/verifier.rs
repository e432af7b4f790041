//! Lets nothing reach a handler that is not signed.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{Address, ChannelKind, Layer, Message, NextHandle, Outcome, now};

use crate::{
    PublicKeys,
    seen::Seen,
    signed::{self, SIGNATURE, Signature},
};

/// How long a signed message is believed, unless said otherwise.
const WINDOW: Duration = Duration::from_secs(24 * 3600);
/// How long what was handled is remembered when the window has no end that a clock can tell.
const FOR_EVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
/// How far a sender's clock may be ahead of ours.
const AHEAD: Duration = Duration::from_secs(60);

/// Does not believe, and says why, what is not signed by a known key for this channel, lately, and for the first time: where it goes
/// says the [`untrusted`](polymq_core::FailurePolicy::untrusted) of the failure policy.
#[derive(Debug)]
pub struct Verifier {
    keys: PublicKeys,
    window: Duration,
    seen: Mutex<Seen>,
}

impl Verifier {
    /// Believes these keys, for a day after a message was made.
    #[must_use]
    pub fn new(keys: PublicKeys) -> Self {
        Self { keys, window: WINDOW, seen: Mutex::default() }
    }

    /// Believes a message for so long after it was made. Longer than it may wait for its last attempt; what was handled
    /// is remembered for as long.
    #[must_use]
    pub fn window(mut self, window: Duration) -> Self {
        self.window = window;
        self
    }

    /// The signature's bytes, or why the message is not believed.
    fn check(&self, message: &Message, destination: &str, by: &str) -> Result<Vec<u8>, String> {
        let header = message.headers().get(SIGNATURE).ok_or("it is not signed")?;
        let signature = Signature::read(header).ok_or("its signature is none")?;
        match self.keys.verify(signature.key, &signed::text(message, destination), &signature.bytes) {
            None => return Err(format!("it is signed by the unknown key {:?}", signature.key)),
            Some(false) => return Err("its signature is wrong: it was changed, or sent elsewhere".to_owned()),
            Some(true) => {}
        }
        let (made, now) = (message.time().ok_or("it does not say when it was made")?, now());
        if now.duration_since(made).is_ok_and(|age| age > self.window) {
            return Err(format!("it was made longer than {:?} ago", self.window));
        }
        if made.duration_since(now).is_ok_and(|ahead| ahead > AHEAD) {
            return Err("it was made in the future".to_owned());
        }
        if self.seen.lock().unwrap_or_else(PoisonError::into_inner).contains(by, &signature.bytes) {
            return Err("it was handled already".to_owned());
        }
        Ok(signature.bytes)
    }

    fn handled(&self, message: &Message, by: &str, signature: &[u8]) {
        let Some(made) = message.time() else { return };
        let until = made.checked_add(self.window.saturating_add(AHEAD)).unwrap_or_else(|| now() + FOR_EVER);
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).add(by, signature, until, now());
    }
}

#[async_trait]
impl Layer for Verifier {
    async fn handle(&self, message: Message, next: NextHandle<'_>) -> Outcome {
        // With wildcards, what was signed is the name that it was sent to.
        let destination = match next.address().kind() {
            ChannelKind::Queue => Address::queue(next.channel()),
            ChannelKind::Topic => Address::topic(next.channel()),
        };
        let by = format!("{} {}", next.address(), next.group().unwrap_or_default());
        let signature = match self.check(&message, &destination.to_string(), &by) {
            Ok(signature) => signature,
            Err(reason) => return Outcome::untrusted(reason),
        };
        let outcome = next.handle(message.clone()).await;
        if !matches!(
            outcome,
            Outcome::Retry { .. } | Outcome::Reject { .. } | Outcome::Untrusted { .. } | Outcome::Defer { .. }
        ) {
            self.handled(&message, &by, &signature);
        }
        outcome
    }
}
