//! What is particular to SQS and SNS, on ministack. The contract itself is tested by the shared suite.
//!
//! The emulator is started by `scripts/brokers`; without one, these tests fail.

#![allow(missing_docs, unreachable_pub)]

#[path = "broker/fifo.rs"]
mod fifo;
#[path = "harness/mod.rs"]
mod harness;
#[path = "broker/requests.rs"]
mod requests;
#[path = "broker/support.rs"]
mod support;
#[path = "broker/topics.rs"]
mod topics;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn trial(name: &'static str, test: impl Future<Output = ()> + Send + 'static) -> Trial {
    Trial::test(name, move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(test);
        Ok(())
    })
}

macro_rules! trials {
    ($module:ident: $($name:ident),* $(,)?) => {
        vec![$(trial(stringify!($name), async { $module::$name().await })),*]
    };
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(6);
    let mut trials = trials!(topics:
        a_message_is_the_same_through_queue_raw_topic_and_wrapped_topic,
        a_group_gets_the_kinds_it_asks_for,
        a_subject_is_read_by_others,
        a_queue_lets_in_its_topic_and_nobody_else,
        a_subscription_without_a_group_leaves_nothing_behind,
    );
    trials.extend(trials!(fifo:
        messages_of_a_key_keep_their_order_through_failures,
        a_repeated_id_is_delivered_once,
        the_group_of_a_foreign_producer_is_the_key,
        what_a_fifo_queue_cannot_do_is_refused,
    ));
    trials.extend(trials!(requests:
        sends_and_acknowledgements_share_their_requests,
        one_refused_entry_fails_alone,
        what_is_throttled_is_sent_once_in_the_end,
        a_held_message_is_held_beyond_its_lease_and_not_beyond_the_cap,
        sqs_itself_moves_to_the_dead_letters,
        a_deleted_queue_is_made_again_or_final,
        closing_does_not_wait_for_a_long_poll,
        a_consumer_without_messages_asks_seldom,
        the_native_clients_are_at_hand,
    ));
    if !arguments.list {
        support::start();
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    // A static is never dropped, and an emulator must not outlive its tests.
    support::stop();
    if conclusion.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
