// Teams: stages in order, every task once, whoever comes; and where helpers run.
#include "core/team.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "core/machine.h"
#include "core/placement.h"
#include "tests/harness.h"

namespace vivace::test {
namespace {

constexpr int kStages = 50;

// Stage s has (7 s) mod 23 tasks, each done once and after all of stage s - 1. `late`: one member loses its processor.
bool stages_hold(int members, bool late = false) {
  std::atomic<int> done[kStages] = {}, early{0};
  const auto count = [](int s) { return s * 7 % 23; };
  Team(members).run([&](Member& member) {
    for (int s = 0; s < kStages; ++s) {
      if (late && member.number() == 1) std::this_thread::sleep_for(std::chrono::microseconds(50 * s));
      member.stage(count(s), [&](int64_t) {
        if (s > 0 && done[s - 1] != count(s - 1)) ++early;
        ++done[s];
      });
    }
  });
  bool once = early == 0;
  for (int s = 0; s < kStages; ++s) once = once && done[s] == count(s);
  return once;
}

VV_TEST(stages_follow_each_other_and_every_task_is_done_once) {
  for (const int members : {-1, 1, 2, 3, 8, 64, 1000}) {
    for (int repeat = 0; repeat < 20; ++repeat) CHECK(stages_hold(members));
  }
}

VV_TEST(a_member_that_comes_late_holds_up_nobody) {
  for (const int members : {2, 4}) CHECK(stages_hold(members, true));
}

VV_TEST(teams_of_many_callers_and_inside_of_each_other_do_their_work) {
  std::vector<std::thread> callers;
  std::atomic<int> right{0};
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 50; ++repeat) right += stages_hold(3);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(right == 200);
  std::atomic<int> inner{0};
  Team(3).run([&](Member& member) { member.stage(8, [&](int64_t) { inner += stages_hold(2); }); });
  CHECK(inner == 8);
}

VV_TEST(members_have_numbers_of_their_own) {
  constexpr int kMembers = 6;
  for (int repeat = 0; repeat < 100; ++repeat) {
    std::atomic<int> inside[kMembers] = {}, shared{0};
    Team(kMembers).run([&](Member& member) {
      if (++inside[member.number()] != 1) ++shared;
      member.stage(64, [](int64_t) {});
    });
    CHECK(shared == 0 && inside[0] == 1);
  }
}

VV_TEST(a_forked_child_has_a_team_of_its_own) {
  CHECK(stages_hold(2));
  const pid_t child = fork();
  if (child == 0) _exit(stages_hold(2) ? 0 : 1);
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

VV_TEST(a_team_is_no_larger_than_the_processors_allow) {
  CHECK(team_size(0) == 1 && team_size(-5) == 1 && team_size(1) == 1);
  CHECK(team_size(int64_t{1} << 40) <= usable_processors() && team_size(2) <= 2);
  int64_t sum = 0;
  run_team(1, [&](Member& member) { member.stage(10, [&](int64_t i) { sum += i; }); });
  CHECK(sum == 45);
}

Processors set_of(std::initializer_list<size_t> members) {
  Processors set;
  for (const size_t i : members) set.set(i);
  return set;
}

VV_TEST(lists_of_processors_are_read) {
  CHECK(parse_processors("0-3,8,10-11\n") == set_of({0, 1, 2, 3, 8, 10, 11}));
  CHECK(parse_processors("5") == set_of({5}) && parse_processors("1022-2000") == set_of({1022, 1023}));
  for (const char* nothing : {"", "\n", "x", "-3", "4-", "9-2", ",", "99999999999999999999"})
    CHECK_IN(parse_processors(nothing).none(), nothing);
  CHECK(parse_processors("a,2,3-x,4") == set_of({2, 4}));
}

VV_TEST(helpers_stay_on_the_node_of_the_caller_when_they_fit) {
  const std::vector<Processors> nodes = {set_of({0, 1, 4, 5}), set_of({2, 3, 6, 7})};
  const Processors all = nodes[0] | nodes[1];
  CHECK(choose_processors(nodes, all, 2, 4) == nodes[1] && choose_processors(nodes, all, 5, 2) == nodes[0]);
  CHECK(choose_processors(nodes, all, 2, 5) == all);
  const Processors some = set_of({1, 2, 3, 4, 6});
  CHECK(choose_processors(nodes, some, 6, 3) == set_of({2, 3, 6}) && choose_processors(nodes, some, 1, 3) == some);
  CHECK(choose_processors({nodes[0]}, all, 0, 1) == all && choose_processors({}, all, 0, 1) == all);
  CHECK(choose_processors(nodes, all, -1, 1) == all && choose_processors(nodes, all, 1024, 1) == all);
  CHECK(choose_processors(nodes, all, 99, 1) == all);
}

}  // namespace
}  // namespace vivace::test
