"""Each limit of docs/protocol.md has a test that fails where the limit is not kept.

The name of the test stands here, or the limit's name in the test.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from tensor_codec.limits import Limits

TESTS = Path(__file__).resolve().parents[1]
LISTS = {"test_limits_are_proved.py", "test_protocol_page.py", "test_stated_values.py", "test_peer_bytes.py"}
ARRIVALS = "unit/test_shares.py::"
LISTENER = "io/test_listener.py::"
HOST = "io/test_host.py::"
REACH = "io/test_reach_listener.py::"
RELAYING = "io/test_relaying.py::"
RELAY_TABLE = "unit/test_relay_table.py::"
TABLE = "io/test_kademlia.py::test_the_limits_of_the_table_are_those_of_the_node"
PROOFS = {
    "max_header_bytes": "unit/test_header.py::test_a_header_may_not_be_larger_than_4_kib_whatever_is_in_it",
    "max_frame_bytes": "unit/test_frame.py::test_the_largest_frame_is_accepted_and_one_byte_more_is_not",
    "frame_start_seconds": LISTENER + "test_silence_instead_of_an_open_ends_at_its_deadline",
    "frame_floor_bytes_per_second": "io/test_streams.py::"
    "test_a_long_frame_has_the_time_that_its_size_takes_at_the_slowest_rate_allowed",
    "reply_taken_seconds": LISTENER + "test_a_client_that_does_not_read_its_answers_is_dropped_at_the_limit",
    "max_connections": HOST + "test_connections_beyond_the_caps_are_closed",
    "max_inbound_connections": HOST + "test_connections_beyond_the_caps_are_closed",
    "max_connections_per_peer": HOST + "test_connections_beyond_the_caps_are_closed",
    "max_connections_per_prefix": "unit/test_connection_table.py::"
    "test_a_public_address_has_eight_places_where_they_are_scarce_and_loopback_its_share",
    "suspect_connections_per_prefix": "unit/test_connection_table.py::"
    "test_a_suspect_address_keeps_its_good_peers_and_has_two_places_for_others",
    "known_good_connection_share": "unit/test_connection_table.py::"
    "test_a_quarter_of_the_places_is_kept_for_peers_known_good",
    "idle_connection_seconds": "unit/test_connection_table.py::"
    "test_without_a_stream_for_some_time_a_connection_of_a_peer_s_is_closed",
    "sockets_per_prefix_per_second": ARRIVALS + "test_where_places_are_plenty_only_a_flood_is_turned_away",
    "sockets_per_prefix_burst": ARRIVALS + "test_where_places_are_plenty_only_a_flood_is_turned_away",
    "handshakes_per_prefix_per_second": ARRIVALS + "test_handshakes_wait_for_their_rate",
    "handshakes_per_prefix_burst": ARRIVALS + "test_handshakes_wait_for_their_rate",
    "scarce_connections_per_second": ARRIVALS
    + "test_where_places_are_scarce_a_public_address_brings_one_a_second_and_loopback_as_many_as_before",
    "scarce_connections_burst": ARRIVALS
    + "test_where_places_are_scarce_a_public_address_brings_one_a_second_and_loopback_as_many_as_before",
    "max_unauthenticated_connections": HOST
    + "test_connections_that_do_not_finish_the_handshake_are_closed_and_hold_nobody_up",
    "handshake_seconds": HOST
    + "test_connections_that_do_not_finish_the_handshake_are_closed_and_hold_nobody_up",
    "membership_seconds": "io/test_upgrade.py::"
    "test_a_stranger_that_knows_the_private_name_and_says_nothing_has_one_second",
    "negotiation_seconds": HOST + "test_a_stream_that_names_no_protocol_is_reset",
    "reach_question_seconds": REACH + "test_a_peer_has_three_questions_at_once_and_one_in_twenty_seconds",
    "reach_questions_burst": REACH + "test_a_peer_has_three_questions_at_once_and_one_in_twenty_seconds",
    "max_reach_addresses": REACH + "test_four_addresses_of_the_asker_s_own_machine_are_dialled",
    "max_reach_questions": REACH + "test_eight_questions_are_dialled_for_at_once",
    "reach_dial_seconds": REACH + "test_a_dial_that_nobody_answers_ends_after_three_seconds",
    "dial_seconds": HOST + "test_all_addresses_together_have_the_time_of_one_dial",
    "max_dials": "io/test_dialler.py::test_silent_peers_that_are_pinged_delay_no_session",
    "first_dial_pause_seconds": "unit/test_dial_rules.py::"
    "test_pauses_double_to_a_minute_less_up_to_half_by_chance",
    "dial_pause_seconds": "unit/test_dial_rules.py::test_pauses_double_to_a_minute_less_up_to_half_by_chance",
    "reached_dial_pause_seconds": "unit/test_dial_rules.py::"
    "test_a_peer_that_was_reached_before_waits_four_seconds_at_most",
    "failed_dials_per_host_per_second": "unit/test_dial_rules.py::"
    "test_failed_dials_to_one_host_have_a_rate_whatever_the_ports",
    "failed_dials_per_host_burst": "io/test_dialler.py::test_ports_of_one_host_are_dialled_at_a_rate",
    "max_successor_addresses": "io/test_dialler.py::"
    "test_of_a_successor_two_addresses_are_dialled_those_reached_before_first",
    "successor_dials_per_client_per_second": "io/test_hop_sessions.py::"
    "test_a_client_may_name_eight_new_hops_at_once_and_one_a_second_then",
    "successor_dials_per_client_burst": "io/test_hop_sessions.py::"
    "test_a_client_may_name_eight_new_hops_at_once_and_one_a_second_then",
    "tcp_user_timeout_seconds": HOST + "test_sockets_of_both_ends_notice_a_dead_peer_in_seconds",
    "max_unread_bytes_per_connection": HOST
    + "test_a_peer_that_ignores_its_window_is_closed_at_the_bound_and_banned",
    "large_bytes_per_connection": "unit/test_large_frames.py::"
    "test_frames_of_up_to_a_mebibyte_share_four_of_them_and_larger_ones_come_one_after_the_other",
    "max_large_frames": "unit/test_large_frames.py::"
    "test_the_usual_limits_leave_room_for_32_of_the_largest_frames",
    "max_reservations": RELAY_TABLE
    + "test_max_reservations_are_given_and_the_next_peer_is_refused_while_others_refresh",
    "max_bootstrap_reservations": RELAY_TABLE + "test_a_bootstrap_node_has_max_bootstrap_reservations",
    "max_reservations_per_prefix": RELAY_TABLE
    + "test_a_public_address_has_max_reservations_per_prefix_and_another_one_its_own",
    "reservation_seconds": RELAY_TABLE
    + "test_a_reservation_ends_after_reservation_seconds_unless_it_is_asked_for_again",
    "max_circuits": RELAY_TABLE + "test_there_are_max_circuits_and_no_more",
    "max_circuits_from_peer": RELAY_TABLE
    + "test_a_source_has_max_circuits_from_peer_and_a_target_max_circuits_to_peer",
    "max_circuits_to_peer": RELAY_TABLE
    + "test_a_source_has_max_circuits_from_peer_and_a_target_max_circuits_to_peer",
    "max_circuits_from_prefix": RELAY_TABLE
    + "test_a_public_address_has_max_circuits_from_prefix_and_of_one_target_as_many_as_a_peer",
    "circuits_per_prefix_per_second": RELAY_TABLE
    + "test_a_public_address_opens_circuits_per_prefix_burst_at_once_and_circuits_per_prefix_per_second_then",
    "circuits_per_prefix_burst": RELAY_TABLE
    + "test_a_public_address_opens_circuits_per_prefix_burst_at_once_and_circuits_per_prefix_per_second_then",
    "circuit_open_seconds": RELAYING + "test_a_target_that_says_nothing_costs_circuit_open_seconds",
    "circuit_idle_seconds": RELAYING + "test_a_circuit_without_a_byte_ends_after_circuit_idle_seconds",
    "circuit_bytes_in_hand": RELAYING + "test_a_slow_target_stops_the_source_and_the_relay_holds_a_window",
    "relay_bytes_per_second": RELAYING
    + "test_all_circuits_together_have_relay_bytes_per_second_and_each_its_part",
    "relay_burst_bytes": "unit/test_fair_rate.py::"
    "test_flows_that_always_ask_get_as_much_as_each_other_and_together_the_rate",
    "max_circuits_per_peer": "unit/test_connection_table.py::"
    "test_a_peer_has_two_connections_through_relays_next_to_its_direct_ones",
    "max_circuit_handshakes": RELAYING + "test_only_a_relay_that_was_asked_brings_peers_and_few_at_once",
    "max_relay_message_bytes": "unit/test_relay_messages.py::"
    "test_a_message_beyond_the_limit_max_relay_message_bytes_is_not_read",
    "max_punches": "io/test_punching.py::test_there_are_max_punches_at_once",
    "punch_seconds": "io/test_punching.py::"
    "test_where_nobody_is_let_in_the_circuit_stays_and_two_tries_have_punch_seconds_each",
    "punch_dial_seconds": "io/test_punching.py::"
    "test_where_nobody_is_let_in_the_circuit_stays_and_two_tries_have_punch_seconds_each",
    "faults_before_ban": "unit/test_faults.py::"
    "test_three_faults_of_its_own_accord_ban_a_peer_for_a_quarter_of_a_minute",
    "fault_window_seconds": "unit/test_bans.py::test_faults_that_are_far_apart_ban_nobody",
    "ban_seconds": "unit/test_faults.py::"
    "test_three_faults_of_its_own_accord_ban_a_peer_for_a_quarter_of_a_minute",
    "grave_fault_ban_seconds": "unit/test_faults.py::"
    "test_one_broken_rule_of_the_muxer_or_one_forged_blob_bans_for_a_minute",
    "longest_ban_seconds": "unit/test_bans.py::test_a_relapse_is_banned_for_twice_as_long_up_to_an_hour",
    "bans_before_suspect": "unit/test_faults.py::"
    "test_an_address_with_several_banned_ids_is_suspect_for_a_minute",
    "suspect_seconds": "unit/test_faults.py::test_an_address_with_several_banned_ids_is_suspect_for_a_minute",
    "max_streams_per_connection": HOST
    + "test_streams_beyond_the_caps_are_reset_and_honest_peers_notice_nothing",
    "max_streams_per_peer": HOST + "test_the_streams_of_a_peer_and_those_of_the_node_are_capped",
    "max_streams": HOST + "test_the_streams_of_a_peer_and_those_of_the_node_are_capped",
    "streams_per_prefix_per_second": ARRIVALS
    + "test_the_peers_of_an_address_open_streams_at_one_rate_and_each_a_few_of_its_own",
    "streams_per_prefix_burst": "unit/test_connection_table.py::"
    "test_peers_of_one_address_open_streams_no_faster_with_many_connections_and_ids",
    "streams_per_peer_per_second": ARRIVALS
    + "test_the_peers_of_an_address_open_streams_at_one_rate_and_each_a_few_of_its_own",
    "streams_per_peer_burst": "unit/test_connection_table.py::"
    "test_peers_of_one_address_open_streams_no_faster_with_many_connections_and_ids",
    "libp2p_stream_seconds": "io/test_kademlia.py::"
    "test_a_stream_without_a_whole_question_ends_at_its_deadline",
    "max_libp2p_bytes_per_stream": "io/test_connection.py::"
    "test_a_stream_of_libp2p_s_ends_when_the_peer_has_sent_more_than_it_may_carry",
    "max_libp2p_streams_per_peer": "unit/test_libp2p_streams.py::test_a_peer_has_two_streams_of_a_protocol",
    "max_libp2p_streams": "unit/test_libp2p_streams.py::"
    "test_where_all_have_one_the_oldest_goes_once_it_took_longer_than_a_question_takes",
    "max_sessions_per_peer": LISTENER + "test_a_peer_has_so_many_sessions_and_no_more_and_others_have_theirs",
    "max_session_tokens": "io/test_hop_sessions.py::"
    "test_a_session_of_exactly_as_many_tokens_as_are_allowed_is_taken",
    "max_step_tokens": "unit/test_messages.py::test_the_limits_of_a_contract_are_reached_and_not_passed",
    "max_steps_per_frame": "unit/test_shared_steps.py::test_no_frame_has_more_steps_than_the_limit",
    "max_steps_in_flight": LISTENER + "test_so_many_steps_may_wait_and_one_more_ends_the_session",
    "max_large_steps": "io/test_session_frames.py::"
    "test_steps_have_room_up_to_the_bound_and_the_place_is_given_back",
    "max_waiting_steps": LISTENER + "test_a_full_queue_refuses_a_step_and_says_when_to_come_back",
    "max_waiting_steps_per_peer": LISTENER + "test_a_full_queue_of_one_peer_leaves_room_for_others",
    "step_wait_seconds": "io/test_hop_sessions.py::"
    "test_a_step_that_waited_too_long_is_refused_to_its_client_and_not_begun",
    "session_first_step_seconds": LISTENER + "test_a_session_without_a_first_step_ends_exactly_at_its_limit",
    "session_idle_seconds": LISTENER + "test_an_idle_session_ends_exactly_at_its_limit",
    "session_life_seconds": LISTENER
    + "test_a_session_that_is_never_idle_ends_exactly_at_the_end_of_its_life",
    "session_position_seconds": LISTENER
    + "test_a_session_that_is_never_idle_ends_exactly_at_the_end_of_its_life",
    "cache_share_per_peer": "unit/test_cache_budget.py::"
    "test_a_peer_at_its_share_is_told_when_to_come_back_and_others_go_on",
    "least_share_tokens": "unit/test_cache_budget.py::test_a_share_is_never_small_where_the_cache_is",
    "max_prompt_bytes": "io/test_prompt_sessions.py::"
    "test_the_bytes_of_prompts_are_counted_for_each_peer_and_for_all_and_given_back",
    "max_prompt_bytes_per_peer": "io/test_prompt_sessions.py::"
    "test_the_bytes_of_prompts_are_counted_for_each_peer_and_for_all_and_given_back",
    "where_per_second": LISTENER
    + "test_a_client_that_asks_where_without_end_is_at_fault_and_one_that_asks_often_is_not",
    "relinks_per_second": LISTENER + "test_a_client_that_changes_the_route_without_end_is_at_fault",
    "idle_steps_per_second": LISTENER + "test_steps_that_no_session_wants_cost_their_pusher_its_stream",
    "frame_rate_session_share": "unit/test_frame_rates.py::test_a_peer_with_more_sessions_may_ask_more",
    "frame_burst_seconds": "unit/test_frame_rates.py::test_a_peer_has_a_burst_and_then_its_rate",
    "frame_rate_peers_per_prefix": "unit/test_frame_rates.py::"
    "test_many_peers_of_one_prefix_wait_and_are_not_at_fault",
    "successor_seconds": LISTENER + "test_a_hop_waits_two_seconds_for_a_next_one_that_does_not_answer",
    "cache_wait_seconds": "io/test_cache_admission.py::"
    "test_no_wait_is_longer_than_allowed_and_its_end_is_a_refusal",
    "max_compute_streams_per_peer": "io/test_forward_backward_listener.py::"
    "test_a_peer_may_have_so_many_streams_and_all_peers_together_so_many",
    "max_compute_streams": "io/test_forward_backward_listener.py::"
    "test_a_peer_may_have_so_many_streams_and_all_peers_together_so_many",
    "compute_idle_seconds": "io/test_forward_backward_listener.py::"
    "test_a_stream_is_closed_when_it_says_nothing_at_first_or_later",
    "refused_compute_bytes_per_second": "io/test_forward_backward_listener.py::"
    "test_a_peer_whose_requests_are_refused_may_send_a_few_of_them_and_then_so_many_bytes_a_second",
    "refused_compute_bytes_burst": "io/test_forward_backward_listener.py::"
    "test_a_peer_whose_requests_are_refused_may_send_a_few_of_them_and_then_so_many_bytes_a_second",
    "max_compute_seconds": "unit/test_batcher.py::"
    "test_a_request_that_would_take_too_long_is_refused_unless_it_is_short",
    "max_record_bytes": "unit/test_records.py::"
    "test_a_record_over_one_kib_is_refused_before_its_signature_is_looked_at",
    "max_records": "unit/test_view.py::test_a_full_view_refuses_new_peers_and_still_hears_those_it_knows",
    "record_life_seconds": "unit/test_view.py::"
    "test_no_record_lives_longer_than_its_reader_allows_whatever_its_peer_says",
    "records_per_peer_per_second": "io/test_directory.py::"
    "test_a_flood_of_valid_records_is_read_no_faster_than_the_limit",
    "records_idle_seconds": "io/test_directory.py::test_a_neighbour_that_falls_silent_is_asked_and_given_up",
    "records_per_peer_burst": "io/test_directory.py::"
    "test_a_flood_of_valid_records_is_read_no_faster_than_the_limit",
    "records_per_network_per_second": "io/test_record_flood.py::"
    "test_neighbours_of_one_public_network_share_its_budget_and_those_at_home_have_none",
    "records_per_network_burst": "io/test_record_flood.py::"
    "test_neighbours_of_one_public_network_share_its_budget_and_those_at_home_have_none",
    "new_peers_per_neighbour_per_second": "io/test_record_flood.py::"
    "test_a_node_that_is_not_flooded_hears_of_few_made_up_servers",
    "new_peers_per_neighbour_burst": "io/test_record_flood.py::"
    "test_a_node_that_is_not_flooded_hears_of_few_made_up_servers",
    "kademlia_message_bytes": "io/test_kademlia.py::test_a_long_message_is_refused_at_its_length",
    "kademlia_questions_per_peer_per_second": "io/test_kademlia.py::"
    "test_questions_beyond_the_budget_are_answered_more_slowly",
    "kademlia_questions_per_peer_burst": "io/test_kademlia.py::"
    "test_questions_beyond_the_budget_are_answered_more_slowly",
    "max_table_peers_per_network": TABLE,
    "max_providers": TABLE,
    "max_providers_per_key": TABLE,
    "max_providers_per_network": TABLE,
    "max_provider_keys_per_peer": TABLE,
    "provider_life_seconds": TABLE,
    "record_ttl_seconds": "io/test_directory.py::"
    "test_a_killed_node_leaves_every_view_within_its_ttl_and_never_comes_back",
    "announce_seconds": "io/test_directory.py::test_nodes_stay_known_for_as_long_as_they_live",
    "descriptor_share": "unit/test_watermarks.py::"
    "test_the_watermarks_are_at_eighty_ninety_and_a_hundred_percent",
    "memory_share": "unit/test_watermarks.py::test_the_watermarks_are_at_eighty_ninety_and_a_hundred_percent",
    "memory_end_share": "unit/test_watermarks.py::"
    "test_the_watermarks_are_at_eighty_ninety_and_a_hundred_percent",
    "memory_retry_seconds": "io/test_server.py::test_a_node_short_of_memory_admits_nothing_and_serves_on",
    "watermark_seconds": "unit/test_watermarks.py::test_a_guard_looks_once_a_second",
    "min_free_disk_bytes": "unit/test_files.py::"
    "test_what_is_fetched_leaves_two_gib_of_a_disk_free_or_a_tenth_of_a_small_one",
    "log_lines_per_peer_per_second": "unit/test_logs.py::"
    "test_of_one_kind_a_peer_gets_five_lines_a_second_and_the_others_are_counted",
    "log_lines_per_second": "unit/test_logs.py::test_ids_made_up_for_each_line_do_not_fill_the_log",
    "max_adapter_sites": "unit/test_adapter_manifests.py::test_a_bad_manifest_is_refused_by_its_field",
    "max_adapter_manifest_bytes": "unit/test_adapter_manifests.py::"
    "test_a_large_manifest_of_different_blocks_fits_its_limit",
    "adapter_idle_seconds": "unit/test_adapter_store.py::test_what_nobody_uses_is_forgotten_after_its_time",
    "adapter_upload_seconds": "io/test_adapter_listener.py::"
    "test_half_an_upload_ends_at_its_deadline_and_gives_its_bytes_back",
    "adapter_offers_per_second": "unit/test_adapter_uploads.py::test_a_peer_that_offers_for_ever_waits",
    "sum_idle_seconds": "unit/test_gradient_sums.py::"
    "test_a_sum_that_nobody_uses_is_gone_and_one_in_use_stays",
    "drain_seconds": LISTENER + "test_draining_ends_by_its_limit_whatever_the_steps_take",
    "drain_idle_seconds": LISTENER
    + "test_a_node_that_drains_finishes_the_steps_in_flight_and_takes_no_new_session",
}


def test_every_limit_has_a_test():
    limits = {each.name for each in fields(Limits)}
    assert PROOFS.keys() <= limits
    texts = [path.read_text() for path in TESTS.rglob("test_*.py") if path.name not in LISTS]
    for limit in limits - PROOFS.keys():
        named = re.compile(rf"\b{limit}\b")
        assert any(map(named.search, texts)), f"{limit}: no test names it, and none is named here"


@pytest.mark.parametrize("limit", PROOFS)
def test_the_test_of_a_limit_exists(limit: str):
    path, _, name = PROOFS[limit].partition("::")
    assert re.search(rf"^(async )?def {name}\(", (TESTS / path).read_text(), re.MULTILINE), PROOFS[limit]
