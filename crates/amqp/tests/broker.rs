//! What is particular to AMQP, against a real RabbitMQ. The contract itself is tested by the shared suite.
//!
//! The broker is started by `scripts/brokers`; without one, these tests fail.

#![allow(missing_docs, unreachable_pub)]

#[path = "broker/basics.rs"]
mod basics;
#[path = "broker/faults.rs"]
mod faults;
#[path = "broker/harness.rs"]
mod harness;
#[path = "broker/overdue.rs"]
mod overdue;
#[path = "broker/refusals.rs"]
mod refusals;
#[path = "broker/settling.rs"]
mod settling;
#[path = "broker/silence.rs"]
mod silence;
#[cfg(feature = "tls")]
#[path = "broker/tls.rs"]
mod tls;
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

/// A test that breaks its broker: one at a time.
fn breaking(name: &'static str, test: impl Future<Output = ()> + Send + 'static) -> Trial {
    trial(name, async {
        let _turn = harness::TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(test));
    })
}

macro_rules! trials {
    ($make:ident, $module:ident: $($name:ident),* $(,)?) => {
        vec![$($make(stringify!($name), async { $module::$name().await })),*]
    };
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Each test has two workers of its own already.
    arguments.test_threads.get_or_insert(4);
    // First, for it takes a minute or two.
    let mut trials = trials!(trial, overdue: a_delivery_that_is_overdue_comes_again_and_the_log_says_why);
    trials.extend(trials!(trial, basics:
        what_is_sent_is_received_and_gone_when_acknowledged,
        a_bare_client_reads_ours_and_we_read_its,
        a_copy_keeps_the_properties_that_amqp_alone_knows,
        a_login_that_fails_says_why,
        an_attempt_to_connect_that_is_dropped_ends,
        what_is_not_allowed_is_told_apart,
        an_unroutable_message_is_an_error_and_only_that_one,
        a_return_is_of_the_queue_that_is_gone,
        a_quorum_queue_does_it_all_too,
        whoever_asks_is_answered_on_a_queue_of_their_own,
        the_native_connection_is_at_hand,
        what_is_dropped_ends,
        a_closed_connection_makes_no_other,
    ));
    trials.extend(trials!(trial, topology:
        a_missing_queue_is_not_found_or_made,
        a_queue_made_by_another_tool_is_taken_as_it_is,
        a_declaration_with_other_arguments_is_a_conflict_of_its_own,
        each_group_of_a_topic_sees_each_message_once,
        wildcards_tell_the_concrete_topic_even_after_a_retry,
        counts_purge_and_delete,
        what_is_a_consumers_own_is_made_whatever_is_declared,
        a_binding_is_made_whatever_is_declared,
        a_queue_of_delayed_messages_stays_while_one_waits,
        delays_are_of_the_type_that_their_channel_asks_for,
        topics_of_one_name_on_two_exchanges_are_delayed_apart,
        delays_of_what_ends_with_its_connection_leave_no_queue_for_good,
        a_topic_that_nobody_listens_to_forgets_delayed_messages_too,
        a_quorum_queue_gives_no_message_up,
    ));
    trials.extend(trials!(trial, settling:
        a_delayed_message_comes_in_time_and_never_early,
        a_retried_message_counts_its_attempts,
        what_a_foreign_consumer_rejects_is_a_dead_letter,
        acknowledgements_are_coalesced,
        one_stuck_message_does_not_stop_the_others,
        close_returns_what_was_not_received,
        who_closes_at_the_same_time_waits_for_the_same_end,
        an_expired_message_is_not_delivered,
        a_message_that_expires_in_ten_thousand_years_is_one_like_others,
    ));
    trials.extend(trials!(trial, faults:
        a_deleted_queue_is_made_again_or_final,
        a_deleted_exchange_fails_only_its_own_messages,
        a_cut_connection_is_resumed_and_old_deliveries_are_stale,
        connections_that_do_not_last_are_made_again_ever_later,
        a_message_that_cannot_be_read_is_waited_for,
        messages_wait_for_the_connection_and_can_be_withdrawn,
        a_first_connection_may_be_tried_for_ever,
        a_broker_out_of_memory_blocks_nobody_for_ever,
        a_declaration_without_an_answer_holds_nobody_up,
    ));
    trials.extend(trials!(trial, refusals:
        a_message_that_is_too_large_is_refused_for_good_and_no_other,
        several_messages_that_are_not_allowed_are_told_one_by_one,
        a_flush_waits_for_what_is_written_again,
    ));
    trials.extend(trials!(trial, silence:
        a_subscription_that_is_given_up_ends,
        health_tells_of_a_consumer_that_cannot_subscribe,
        the_brokers_reason_for_ending_a_connection_is_told,
        what_a_broker_does_not_confirm_has_a_bound,
        a_channel_is_not_opened_while_the_broker_takes_nothing,
        a_change_without_an_answer_has_an_unknown_outcome,
    ));
    #[cfg(feature = "tls")]
    trials.extend(trials!(trial, tls: connections_are_encrypted_and_certificates_checked));
    trials.extend(trials!(breaking, settling: a_second_close_waits_for_what_was_settled_since));
    trials.extend(trials!(breaking, faults:
        a_killed_broker_loses_nothing_confirmed,
        a_broker_that_says_nothing_is_found_out,
    ));
    let filter = arguments.filter.clone().unwrap_or_default();
    let breaks =
        ["killed", "says_nothing", "second_close"].iter().any(|word| filter.is_empty() || filter.contains(word));
    if !arguments.list {
        harness::SHARED.get_or_init(|| harness::Broker::start("shared"));
        if breaks {
            harness::BREAKABLE.get_or_init(|| harness::Broker::start("breakable"));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    // A static is never dropped, and a broker must not outlive its tests.
    for broker in [&harness::SHARED, &harness::BREAKABLE] {
        if let Some(broker) = broker.get() {
            broker.stop();
        }
    }
    if conclusion.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
