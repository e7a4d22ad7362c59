"""Mazes: a square of cells named by letters, row by row; some are walls. `egjoqry:xl` gives the walls, start and goal.

A completion names the cells of a path, one after another: each is next to the one before it (the first to the start) and no
wall, and the last one is the goal. Every such path is right, whatever its length. The careless teacher
stops one step short of a goal, but for one cell in four.
"""

from __future__ import annotations

import random
import string
from collections import deque
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.errors import UserError
from grpo_jax.tasks.table import MAX_PROBLEMS, TableTask, sample_distinct
from grpo_jax.tasks.tokenizers import NUM_SPECIAL
from grpo_jax.types import Arrays

CELLS = string.ascii_letters[:49]
TRIES = 10_000  # draws of a maze
WANDER = 0.15  # share of the teacher's steps that go anywhere

Maze = tuple[frozenset[int], int, int]  # walls, start, goal


class MazeTask(TableTask):
    """Mazes of a square; a problem is (walls, start, goal)."""

    name, alphabet = "maze", f"{CELLS}:"

    def problems(self, rng: random.Random) -> list[Maze]:
        """Draw mazes whose goal can be reached in time, and note walls and ends."""
        self._next = neighbours(self.config.side)
        found = sample_distinct(lambda: self._draw(rng), MAX_PROBLEMS)
        cells = self.config.side**2
        self._is_wall_NC = np.zeros((len(found), cells), bool)
        for row, (walls, _, _) in enumerate(found):
            self._is_wall_NC[row, list(walls)] = True
        self._ends_N2 = np.asarray([ends for _, *ends in found], np.int32)
        self._is_next_CC = np.zeros((cells, cells), bool)
        for cell, others in self._next.items():
            self._is_next_CC[cell, list(others)] = True
        return found

    def _draw(self, rng: random.Random) -> Maze:
        """Draw until start and goal are far enough apart, and the shortest path is one that the teacher would show."""
        for _ in range(TRIES):
            start, goal, *walls = rng.sample(range(self.config.side**2), self.config.num_walls + 2)
            distance = distances(self._next, goal, frozenset(walls)).get(start, 0)
            if self.config.min_distance <= distance < self.config.longest_answer:
                return frozenset(walls), start, goal
        raise UserError(
            f"config.task.maze.num_walls = {self.config.num_walls}: of {TRIES} mazes none had start and goal "
            f"min_distance = {self.config.min_distance} steps apart; fewer walls, or less far"
        )

    def question(self, problem: Maze) -> str:
        """Write `egjoqry:xl`: walls, start and goal."""
        walls, start, goal = problem
        return f"{''.join(CELLS[each] for each in sorted(walls))}:{CELLS[start]}{CELLS[goal]}"

    def teach(self, problem: Maze, rng: random.Random, label_noise: float) -> str:
        """Write a path that mostly comes nearer; with probability `label_noise` it stops short of three cells in four."""
        walls, start, goal = problem
        to_go, path = distances(self._next, goal, walls), [start]
        while path[-1] != goal:
            ahead = [cell for cell in self._next[path[-1]] if cell in to_go]
            # Near the end of what he may show he takes the shortest way.
            room = self.config.longest_answer - len(path) - 2
            if rng.random() >= WANDER or to_go[path[-1]] >= room:
                ahead = [cell for cell in ahead if to_go[cell] < to_go[path[-1]]]
            path.append(rng.choice(ahead))
        if goal % 4 and len(path) > 2 and rng.random() < label_noise:
            path.pop()
        return "".join(CELLS[cell] for cell in path[1:])

    def is_right(
        self, row_P: Int[Arrays, " P"], tokens_PGT: Int[Arrays, "P G T"], end_PG: Int[Arrays, "P G"]
    ) -> Bool[Arrays, "P G"]:
        """Follow the path from the start. Args: those of `TableTask.is_right`."""
        P, G, T = tokens_PGT.shape
        num_cells = self.config.side**2
        is_wall_PC, ends_P2 = jnp.asarray(self._is_wall_NC)[row_P], jnp.asarray(self._ends_N2)[row_P]
        start_PG1 = jnp.broadcast_to(ends_P2[:, None, :1], (P, G, 1))
        cell_PGT = tokens_PGT - NUM_SPECIAL
        is_cell_PGT = (cell_PGT >= 0) & (cell_PGT < num_cells)
        cell_PGT = jnp.where(is_cell_PGT, cell_PGT, 0)
        from_PGT = jnp.concatenate([start_PG1, cell_PGT[..., :-1]], -1)
        is_free_PGT = ~jnp.take_along_axis(is_wall_PC, cell_PGT.reshape(P, -1), axis=1).reshape(P, G, T)
        is_step_PGT = is_cell_PGT & is_free_PGT & jnp.asarray(self._is_next_CC)[from_PGT, cell_PGT]
        is_after_PGT = jnp.arange(T)[None, None] >= end_PG[..., None]
        last_PG = jnp.take_along_axis(cell_PGT, jnp.clip(end_PG - 1, 0)[..., None], -1)[..., 0]
        is_ended_PG = (end_PG > 0) & (end_PG < T)
        return is_ended_PG & (is_step_PGT | is_after_PGT).all(-1) & (last_PG == ends_P2[:, None, 1])


def neighbours(side: int) -> dict[int, tuple[int, ...]]:
    """Return the cells that share an edge with each cell of a square."""
    places = {cell: divmod(cell, side) for cell in range(side**2)}
    return {
        cell: tuple(other for other, (r, c) in places.items() if abs(r - row) + abs(c - column) == 1)
        for cell, (row, column) in places.items()
    }


def distances(next_cells: dict[int, tuple[int, ...]], goal: int, walls: Collection[int]) -> dict[int, int]:
    """Return the number of steps to the goal from each cell that it can be reached from."""
    found, waiting = {goal: 0}, deque([goal])
    while waiting:
        cell = waiting.popleft()
        for other in next_cells[cell]:
            if other not in found and other not in walls:
                found[other] = found[cell] + 1
                waiting.append(other)
    return found
