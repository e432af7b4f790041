//! Lets nothing reach a handler that is not signed.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{Address, ChannelKind, Layer, Message, NextHandle, Outcome, now};

use crate::{
    PublicKeys,
    seen::{Known, Mark, Seen, mark},
    signed::{self, SIGNATURE, Signature},
};

/// How long a signed message is believed, unless said otherwise.
const WINDOW: Duration = Duration::from_secs(24 * 3600);
/// How long what was handled is remembered when the window has no end that a clock can tell.
const FOR_EVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
/// How far a sender's clock may be ahead of ours.
const AHEAD: Duration = Duration::from_secs(60);
/// How soon a copy comes again whose like is being handled.
const BESIDE: Duration = Duration::from_secs(1);

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
    /// is remembered for as long, with some 70 bytes a message.
    #[must_use]
    pub fn window(mut self, window: Duration) -> Self {
        self.window = window;
        self
    }

    /// The signature's bytes, or why the message is not believed.
    fn check(&self, message: &Message, destination: &str) -> Result<Vec<u8>, String> {
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
        Ok(signature.bytes)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handled(&self, message: &Message, mark: &Mark) {
        let Some(made) = message.time() else { return };
        let until = made.checked_add(self.window.saturating_add(AHEAD)).unwrap_or_else(|| now() + FOR_EVER);
        self.seen().add(mark, until, now());
    }
}

/// A message that is being handled, until that has ended or was cancelled.
struct UnderWay<'a> {
    verifier: &'a Verifier,
    mark: Mark,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.verifier.seen().end(&self.mark);
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
        let by = match (next.address().kind(), next.group()) {
            // Each of them has the message.
            (ChannelKind::Topic, None) => format!("{} #{}", next.address(), next.subscription()),
            (_, group) => format!("{} {}", next.address(), group.unwrap_or_default()),
        };
        let mark = match self.check(&message, &destination.to_string()) {
            Ok(signature) => mark(&by, &signature),
            Err(reason) => return Outcome::untrusted(reason),
        };
        let known = self.seen().begin(&mark);
        let under_way = match known {
            Known::New => UnderWay { verifier: self, mark },
            // Whether it is a replay, is known when the other one has ended.
            Known::UnderWay => return Outcome::defer(BESIDE),
            Known::Handled => return Outcome::untrusted("it was handled already"),
        };
        let outcome = next.handle(message.clone()).await;
        if !matches!(
            outcome,
            Outcome::Retry { .. } | Outcome::Reject { .. } | Outcome::Untrusted { .. } | Outcome::Defer { .. }
        ) {
            self.handled(&message, &under_way.mark);
        }
        outcome
    }
}
