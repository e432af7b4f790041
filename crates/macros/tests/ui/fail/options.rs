use polymq::prelude::*;

#[consumer]
async fn no_channel() {}

#[consumer(group = "audit")]
async fn option_first() {}

#[consumer(5)]
async fn number_as_name() {}

#[consumer("")]
async fn empty_name() {}

#[consumer("orders", concurency = 8)]
async fn misspelt() {}

#[consumer("orders", method = "GET", port = 80)]
async fn unknown() {}

#[consumer("orders", concurrency = "8")]
async fn text_for_number() {}

#[consumer("orders", concurrency = 0)]
async fn zero() {}

#[consumer("orders", attempts = -1)]
async fn negative() {}

#[consumer("orders", concurrency)]
async fn no_value() {}

#[consumer("orders", concurrency =)]
async fn no_value_after_equals() {}

#[consumer("orders", existing = true)]
async fn value_for_flag() {}

#[consumer("orders", group = 7)]
async fn number_for_text() {}

#[consumer("orders", timeout = "5")]
async fn duration_without_unit() {}

#[consumer("orders", timeout = 5)]
async fn number_for_duration() {}

#[consumer("orders", timeout = "0s")]
async fn duration_of_nothing() {}

#[consumer("orders", ack = "never")]
async fn unknown_ack() {}

#[consumer("orders", retry = "later")]
async fn unknown_retry() {}

#[consumer("orders", prefetch = 1, prefetch = 2)]
async fn twice() {}

#[consumer("orders", group = "audit", broadcast)]
async fn group_and_broadcast() {}

#[consumer("orders", policy = FailurePolicy::default(), attempts = 2)]
async fn policy_and_attempts() {}

#[consumer("orders", ordered_by_key, retry = "redeliver")]
async fn order_lost() {}

#[consumer("orders", with = "qos")]
async fn with_alone() {}

fn main() {}
