//! Who may send to a queue: the statements of its policy that let topics in.
//!
//! A policy can only be written as a whole, whatever is in it by then: of two programs that let a topic in at the same time,
//! the later one takes the earlier one's statement away, and SNS drops that topic's messages. And for up to a minute AWS may
//! still show the policy of before. So what this connection has added lately is added whatever is read, and what was written
//! is looked at again when others have had the time to write too.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use aws_sdk_sqs::types::QueueAttributeName;
use polymq_core::Result;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::{
    clients::Live,
    topology::{attribute, set},
};

/// The principal that a queue's policy lets in.
const SNS: &str = "sns.amazonaws.com";

/// How long AWS may take to show everybody what was written.
const SPREAD: Duration = Duration::from_secs(60);

/// How long others may take between reading a policy and writing it, about: a slow network, or a process that stands still. It is
/// waited for only after something was written.
const OTHERS: Duration = Duration::from_millis(750);

/// How long a policy is looked at that does not become what it is meant to be; less than a declaration may take.
const LOOKED_AT: Duration = Duration::from_secs(5);

/// The topics that a connection has let in lately, by queue.
#[derive(Debug, Default)]
pub(crate) struct Grants(Mutex<HashMap<String, HashMap<String, Instant>>>);

impl Grants {
    fn add(&self, queue: &str, topic: &str) {
        let mut grants = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        grants.entry(queue.to_owned()).or_default().insert(topic.to_owned(), Instant::now());
    }

    fn remove(&self, queue: &str, topic: &str) {
        let mut grants = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        grants.get_mut(queue).map(|topics| topics.remove(topic));
    }

    /// What a policy of this queue must hold.
    fn of(&self, queue: &str) -> Vec<String> {
        let mut grants = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        grants.retain(|_, topics| {
            topics.retain(|_, added| added.elapsed() < SPREAD);
            !topics.is_empty()
        });
        grants.get(queue).map(|topics| topics.keys().cloned().collect()).unwrap_or_default()
    }
}

/// Lets this topic, and nobody else, send to this queue; statements of other people stay.
pub(crate) async fn allow(live: &Live, url: &str, queue: &str, topic: &str) -> Result<()> {
    live.grants.add(queue, topic);
    write(live, url, queue, None).await.map(drop)
}

/// The same for a queue that other topics are let in to as well, perhaps at this moment.
pub(crate) async fn allow_beside(live: &Live, url: &str, queue: &str, topic: &str) -> Result<()> {
    live.grants.add(queue, topic);
    let began = Instant::now();
    while began.elapsed() < LOOKED_AT {
        if !write(live, url, queue, None).await? {
            return Ok(());
        }
        // Jitter, or those who write at the same time do so again.
        sleep(OTHERS.mul_f64(1.0 + fastrand::f64())).await;
    }
    // What is read may be old; what was written is right.
    tracing::debug!(queue, "the queue's policy does not show yet what was written");
    Ok(())
}

/// Takes that back.
pub(crate) async fn disallow(live: &Live, url: &str, queue: &str, topic: &str) -> Result<()> {
    live.grants.remove(queue, topic);
    write(live, url, queue, Some(topic)).await.map(drop)
}

/// Writes the policy, unless it is as it is meant to be; whether it was not.
async fn write(live: &Live, url: &str, queue: &str, gone: Option<&str>) -> Result<bool> {
    let present = attribute(live, url, QueueAttributeName::Policy).await?;
    match edited(present.as_deref(), queue, &live.grants.of(queue), gone) {
        Some(policy) => set(live, url, QueueAttributeName::Policy, &policy).await.map(|()| true),
        None => Ok(false),
    }
}

/// What lets a topic, and nobody else, send to a queue.
fn statement(queue: &str, topic: &str) -> Value {
    json!({
        "Effect": "Allow",
        "Principal": { "Service": SNS },
        "Action": "sqs:SendMessage",
        "Resource": queue,
        "Condition": { "ArnEquals": { "aws:SourceArn": topic } },
    })
}

/// The policy with the statements of these topics and without that of `gone`, empty when there is no other; `None` when it
/// is so already.
fn edited(present: Option<&str>, queue: &str, topics: &[String], gone: Option<&str>) -> Option<String> {
    let mut policy: Value = present
        .and_then(|text| serde_json::from_str(text).ok())
        .filter(Value::is_object)
        .unwrap_or_else(|| json!({ "Version": "2012-10-17", "Statement": [] }));
    if !policy["Statement"].is_array() {
        let single = policy["Statement"].take();
        policy["Statement"] = Value::from(if single.is_null() { Vec::new() } else { vec![single] });
    }
    let statements = policy["Statement"].as_array_mut()?;
    let gone = gone.map(|topic| statement(queue, topic));
    let before = statements.len();
    statements.retain(|statement| Some(statement) != gone.as_ref());
    let mut changed = statements.len() < before;
    for statement in topics.iter().map(|topic| statement(queue, topic)) {
        if !statements.contains(&statement) {
            statements.push(statement);
            changed = true;
        }
    }
    let empty = statements.is_empty();
    changed.then(|| if empty { String::new() } else { policy.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUEUE: &str = "arn:aws:sqs:eu-west-1:1:orders---billing";
    const TOPIC: &str = "arn:aws:sns:eu-west-1:1:orders";

    fn with(present: Option<&str>) -> Option<String> {
        edited(present, QUEUE, &[TOPIC.to_owned()], None)
    }

    fn without(present: &str) -> Option<String> {
        edited(Some(present), QUEUE, &[], Some(TOPIC))
    }

    #[test]
    fn a_policy_names_the_topic_and_the_queue_and_nobody_else() {
        let text = with(None).expect("new");
        let policy: Value = serde_json::from_str(&text).expect("JSON");
        let statement = &policy["Statement"][0];
        assert_eq!(statement["Principal"], json!({ "Service": "sns.amazonaws.com" }));
        assert_eq!(statement["Action"], "sqs:SendMessage");
        assert_eq!(statement["Resource"], QUEUE);
        assert_eq!(statement["Condition"], json!({ "ArnEquals": { "aws:SourceArn": TOPIC } }));
        assert!(!text.contains('*'), "{text}");
        assert_eq!(with(Some(&text)), None, "it is not added twice");
    }

    #[test]
    fn the_policy_of_others_stays() {
        let theirs = json!({ "Version": "2012-10-17", "Id": "theirs", "Statement": { "Sid": "one" } });
        let text = with(Some(&theirs.to_string())).expect("extended");
        let policy: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((policy["Id"].as_str(), policy["Statement"][0]["Sid"].as_str()), (Some("theirs"), Some("one")));
        assert_eq!(policy["Statement"].as_array().map(Vec::len), Some(2));
        let left = without(&text).expect("ours is taken out");
        assert!(left.contains("theirs") && !left.contains(TOPIC), "{left}");
        assert_eq!(without(&left), None, "it is not there any more");
        assert_eq!(without(&with(None).expect("new")).as_deref(), Some(""), "no policy lets nobody in");
    }
}
