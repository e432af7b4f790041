//! What is particular to SQS and SNS, on ministack. The contract itself is tested by the shared suite.
//!
//! The emulator is started by `scripts/brokers`; without one, these tests fail.

#![allow(missing_docs, unreachable_pub)]

#[path = "broker/closing.rs"]
mod closing;
#[path = "broker/fifo.rs"]
mod fifo;
#[path = "harness/mod.rs"]
mod harness;
#[path = "broker/limits.rs"]
mod limits;
#[path = "broker/requests.rs"]
mod requests;
#[path = "broker/security.rs"]
mod security;
#[path = "broker/support.rs"]
mod support;
#[path = "broker/topics.rs"]
mod topics;
#[path = "broker/topology.rs"]
mod topology;

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
    limits::run_if_alone();
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(6);
    let mut trials = trials!(topics:
        c26_a_message_is_the_same_through_queue_raw_topic_and_wrapped_topic,
        c12_three_queues_and_two_filters_route_exactly,
        b17_attributes_are_read_by_a_raw_subscriber_however_many_there_are,
        c17_a_delivery_tells_what_sqs_shows,
        a_subject_is_read_by_others,
        h13_a_queue_lets_in_its_topic_and_nobody_else,
        a_subscription_without_a_group_leaves_nothing_behind,
        an_idle_subscription_without_a_group_leaves_nothing_behind,
        queues_go_on_while_sns_is_away,
        a_deleted_topic_is_not_made_again_by_its_senders,
    );
    trials.extend(trials!(topology:
        h1_declaring_twice_is_harmless_and_looking_creates_nothing,
        h2_refused_credentials_are_no_missing_queue_and_nothing_is_made,
        h3_a_queue_is_bound_to_several_topics_one_after_the_other,
        two_programs_bind_a_queue_at_once,
        what_is_a_consumers_own_is_made_whatever_is_declared,
        h10_h14_channels_are_listed_and_emptied,
    ));
    trials.extend(trials!(fifo:
        b10_messages_of_a_key_keep_their_order_through_failures,
        b11_a_repeated_id_is_delivered_once,
        h6_a_hundred_messages_come_in_order,
        the_group_of_a_foreign_producer_is_the_key,
        what_a_fifo_queue_cannot_do_is_refused,
    ));
    trials.extend(trials!(requests:
        sends_and_acknowledgements_share_their_requests,
        b7_of_twenty_five_items_one_bad_one_fails_alone,
        what_is_throttled_is_sent_once_in_the_end,
        what_is_answered_with_503_is_not_sent_again_by_itself,
        what_is_throttled_in_a_batch_is_sent_once_in_the_end,
        c10_a_held_message_is_held_beyond_its_lease_and_not_beyond_the_cap,
        h5_sqs_itself_moves_to_the_dead_letters,
        a_redrive_that_sqs_would_not_do_is_refused,
        a_deleted_queue_is_made_again_or_final,
        closing_does_not_wait_for_a_long_poll,
        a_consumer_without_messages_asks_seldom,
        the_native_clients_are_at_hand,
        trouble_with_one_send_is_no_lost_service,
        a_message_that_sqs_shows_again_is_not_copied,
        a_foreign_message_goes_back_as_it_was,
        what_is_withdrawn_during_an_outage_is_not_kept,
    ));
    trials.extend(trials!(closing: a_close_that_was_dropped_is_waited_for, closing_waits_for_a_long_poll_once));
    trials.extend(trials!(security:
        j4_connections_are_encrypted_and_certificates_checked,
        j5_rotated_credentials_reach_every_connection,
        a_wrong_signature_is_refused_and_tells_no_secret,
        j6_credentials_are_not_sent_in_clear_to_another_machine,
    ));
    trials.extend(trials!(limits:
        j21_operations_end_in_time_when_the_service_is_silent,
        j22_memory_is_bounded_while_the_service_stalls,
        j11_failing_polls_are_backed_off,
        j11_an_idle_consumer_costs_less_than_a_hundredth_of_a_core,
    ));
    if !arguments.list {
        support::start();
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    // A static is never dropped, and an emulator must not outlive its tests.
    support::stop();
    if conclusion.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
